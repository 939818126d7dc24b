"""A graph in half precision, as strongly typed engines want it: the types of the graph are the types that are used.

Inputs and outputs of the graph keep their types, so that every engine of a component is called alike. Weights are read,
converted and written one at a time. (onnxruntime's float16 converter has no bf16, and NVIDIA's AutoCast needs torch and
a calibration run; both hold the whole model in memory.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from slipcast.errors import SlipcastError

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# Operators that, with all that leads to them, stay in fp32: the angles of a timestep embedding go up to 1000, where
# fp16 has steps of 0.5. What comes out is at most 1, and is rounded like everything else.
ANGLES = ("Sin", "Cos")
# Inputs that are fp32 whatever the type of the data: (operator, first place that is so).
FP32_INPUTS = {"Resize": 1, "QuantizeLinear": 1, "DequantizeLinear": 0}


def cast_graph(source: Path, precision: str, target: Path) -> None:
    """Write the fp32 graph `source` to `target` (with its weights beside it) in "fp16" or "bf16".

    What is quantised stays so: scales remain fp32, and what is dequantised comes out in the half precision. Norms and
    softmax keep accumulating in fp32, which is in the operators' own definition. Raises SlipcastError, naming the
    tensor, for a weight that the precision cannot hold.
    """
    model = ir.load(source)
    if any(output.dtype is None for node in model.graph for output in node.outputs):
        ShapeInferencePass()(model)
    _Caster(model.graph, DTYPES[precision], precision).run()
    try:
        ir.save(model, target, external_data=f"{target.name}.data")
    except Exception as error:  # weights are converted on the way, and the library wraps what happens there
        cause: BaseException | None = error
        while cause and not isinstance(cause, SlipcastError):
            cause = cause.__cause__
        raise cause or error from None


class _Caster:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType, precision: str) -> None:
        self._graph, self._dtype, self._precision = graph, dtype, precision
        self._exact = _ancestors(graph)
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self._graph):
            dtype = ir.DataType.FLOAT if node in self._exact else self._dtype
            first = FP32_INPUTS.get(node.op_type, len(node.inputs))
            for i, value in enumerate(node.inputs):
                if value is not None and _floating(value):
                    wanted = ir.DataType.FLOAT if i >= first else dtype
                    node.replace_input_with(i, self._as(value, wanted, node))
            self._set_outputs(node, dtype)
        for i, value in enumerate(self._graph.outputs):
            if value.dtype == self._dtype:
                self._graph.outputs[i] = self._output(value)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():
                del self._graph.initializers[name]

    def _set_outputs(self, node: ir.Node, dtype: ir.DataType) -> None:
        if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
        if node.op_type == "DequantizeLinear":
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", dtype)
        for name in ("value", "value_float", "value_floats"):  # of Constant and ConstantOfShape
            if name in node.attributes and any(_floating(output) for output in node.outputs):
                raise SlipcastError(f"{node.name}: a {node.op_type} in fp32 cannot be cast", hint="report it")
        for output in node.outputs:
            if _floating(output):
                output.dtype = dtype

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """The same value in `dtype`: a converted weight, or a Cast in front of the first node that needs it."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            make = self._weight if value.const_value is not None else self._cast
            self._made[value, dtype] = make(value, dtype, before)
        return self._made[value, dtype]

    def _weight(self, value: ir.Value, dtype: ir.DataType, _: ir.Node) -> ir.Value:
        tensor, name = value.const_value, f"{value.name}.{self._precision}"
        assert tensor is not None

        def read() -> ir.Tensor:
            array = tensor.numpy()
            with np.errstate(over="ignore"):
                converted = array.astype(dtype.numpy())
            if (np.isinf(converted.astype(np.float32)) & np.isfinite(array)).any():
                raise SlipcastError(
                    f"{value.name}: does not fit into {self._precision}", expected="finite numbers",
                    got=f"values up to {np.abs(array).max():g}", hint='choose precision = "bf16" or "fp32"',
                )  # fmt: skip
            return ir.Tensor(converted, dtype=dtype, name=name)

        made = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        made.const_value = ir.LazyTensor(read, dtype=dtype, shape=tensor.shape, name=name)
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}.to_{dtype.name.lower()}")
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{value.name}.{dtype.name.lower()}", ir.TensorType(dtype), value.shape
        before.prepend(node)
        return made

    def _output(self, value: ir.Value) -> ir.Value:
        """The graph's output in fp32 again, under its own name."""
        name = value.name
        value.name = f"{name}.{self._precision}"
        node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}.to_float")
        node.outputs[0].name, node.outputs[0].shape = name, value.shape
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self._graph.append(node)
        return node.outputs[0]


def _floating(value: ir.Value) -> bool:
    return bool(value.dtype == ir.DataType.FLOAT)


def _ancestors(graph: ir.Graph) -> set[ir.Node]:
    """ANGLES and all nodes that they depend on."""
    pending = [node for node in graph if node.op_type in ANGLES]
    found = set[ir.Node]()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(_producers(node))
    return found


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        if value is not None and (producer := value.producer()) is not None:
            yield producer
