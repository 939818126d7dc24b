"""A graph in half precision, as strongly typed engines want it: the types of the graph are the types that are used.

Inputs and outputs of the graph keep their types, so that every engine of a component is called alike. Weights are read,
converted and written one at a time. (onnxruntime's float16 converter has no bf16, and NVIDIA's AutoCast needs torch and
a calibration run; both hold the whole model in memory.)
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from slipcast.errors import SlipcastError
from slipcast_compiler.graph.tidy import constant
from slipcast_compiler.graph.weights import anchor

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# Inputs that are fp32 whatever the type of the data: (operator, first place that is so).
FP32_INPUTS = {"Resize": 1, "QuantizeLinear": 1, "DequantizeLinear": 0}
HEADROOM = 2.0  # between what a tensor was seen to hold and the most that fp16 can


def cast_graph(source: Path, precision: str, target: Path, fp32: Collection[str] = ()) -> None:
    """Write the fp32 graph `source` to `target` (with its weights beside it) in "fp16" or "bf16".

    Nodes named in `fp32` stay so, with their weights, unless they are quantised. What is quantised stays so: scales
    remain fp32, and what is dequantised comes out in the half precision. Norms and softmax keep accumulating in fp32,
    which is in the operators' own definition, but for norms that norms.py has spelled out. A weight that the precision
    cannot hold becomes infinite: what that does is for mixed_precision.py to measure (a mask that is the least number
    of all may be so without harm).
    """
    model = anchor(_load(source), source.parent)
    _Caster(model.graph, DTYPES[precision], precision, fp32).run()
    ir.save(model, target, external_data=f"{target.name}.data")


def castable(source: Path) -> dict[str, str]:
    """The nodes that a cast changes, in the graph's order: name -> operator."""
    found = {}
    for node in _load(source).graph:
        values = [*node.inputs[: _first_fp32(node)], *node.outputs]
        if any(value is not None and _floating(value) for value in values):
            found[str(node.name)] = node.op_type
    return found


def rounded_graph(source: Path, precision: str, fp32: Collection[str] = ()) -> bytes:
    """The graph of cast_graph, computed in fp32 and rounded wherever that one has a tensor in half precision.

    So it runs where the precision has no kernels, and no engine saves a rounding: ONNX Runtime, on a CPU, keeps what is
    between two operators in fp32, and the reference model's decoder is 3e-6 off in fp16 there, where the types of its
    graph make 3e-4. Weights stay in the file of `source`. What would not fit into the precision if it were HEADROOM
    times larger becomes infinite, since other inputs give other peaks.
    """
    model, half, rounded = _load(source), DTYPES[precision], dict[ir.Value, ir.Value]()
    for node in list(model.graph):
        if node.name in fp32:
            continue
        for place, value in enumerate(node.inputs[: _first_fp32(node)]):
            if value is not None and _floating(value):
                if value not in rounded:
                    node.prepend(_round(model.graph, value, half, rounded))
                node.replace_input_with(place, rounded[value])
        for output in filter(_floating, node.outputs):
            uses = output.uses()
            node.append(_round(model.graph, output, half, rounded))
            for user, place in uses:
                user.replace_input_with(place, rounded[output])
            if output in model.graph.outputs:
                model.graph.outputs[model.graph.outputs.index(output)] = rounded[output]
                output.name, rounded[output].name = f"{output.name}.exact", output.name
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


def _round(graph: ir.Graph, value: ir.Value, half: ir.DataType, rounded: dict[ir.Value, ir.Value]) -> list[ir.Node]:
    """To half precision and back; what comes out is noted in `rounded` as what becomes of the value, and of itself."""
    steps: list[tuple[str, ir.DataType, float]] = [("Cast", half, 0.0), ("Cast", ir.DataType.FLOAT, 0.0)]
    if half == ir.DataType.FLOAT16 and value.const_value is None:  # weights are the same for all inputs
        steps = [("Mul", ir.DataType.FLOAT, HEADROOM), *steps, ("Mul", ir.DataType.FLOAT, 1 / HEADROOM)]
    nodes, last = list[ir.Node](), value
    for place, (kind, dtype, by) in enumerate(steps):
        factor = [constant(graph, f"headroom_{by:g}", np.array(by, np.float32))] if by else []
        nodes.append(
            ir.node(kind, [last, *factor], {} if by else {"to": dtype}, name=f"{value.name}.round_{place}")
        )  # fmt: skip
        last = nodes[-1].outputs[0]
        last.name, last.shape, last.type = f"{nodes[-1].name}.out", value.shape, ir.TensorType(dtype)
    rounded[value] = rounded[last] = last
    return nodes


def _load(source: Path) -> ir.Model:
    model = ir.load(source)
    if any(output.dtype is None for node in model.graph for output in node.outputs):
        ShapeInferencePass()(model)
    return model


class _Caster:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType, precision: str, fp32: Collection[str]) -> None:
        self._graph, self._dtype, self._precision, self._fp32 = graph, dtype, precision, fp32
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self._graph):
            quantised = any(v is not None and _made_by(v) == "DequantizeLinear" for v in node.inputs)
            dtype = ir.DataType.FLOAT if node.name in self._fp32 and not quantised else self._dtype
            first = _first_fp32(node)
            for place, value in enumerate(node.inputs):
                if value is not None and value.dtype in (ir.DataType.FLOAT, self._dtype):
                    wanted = dtype if place < first else ir.DataType.FLOAT
                    node.replace_input_with(place, self._as(value, wanted, node))
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
            with np.errstate(over="ignore"):
                return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=name)

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


def _made_by(value: ir.Value) -> str | None:
    producer = value.producer()
    return producer.op_type if producer else None


def _first_fp32(node: ir.Node) -> int:
    """The first of its inputs that stays in fp32 whatever the node computes in."""
    return FP32_INPUTS.get(node.op_type, len(node.inputs))
