"""INT8 in an ONNX graph: which nodes are layers, SmoothQuant, and QuantizeLinear and DequantizeLinear around some."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from slipcast_compiler.graph import slices
from slipcast_compiler.graph.weights import anchor, load, read_tensor

Arrays = dict[str, npt.NDArray[Any]]

WEIGHTED = ("Conv", "Gemm", "MatMul")


def layers_of(graph: Any) -> dict[str, tuple[str, ...]]:
    """Layer -> names of its nodes: every node of WEIGHTED whose weight is a constant, by its weight's name.

    The name is the checkpoint's: down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q; of a captured program's,
    with the component before it.
    """
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.node:
        if node.op_type in WEIGHTED and node.input[1] in constants and node.input[0] not in constants:
            layer = layer_of(node.input[1])
            found[layer] = (*found.get(layer, ()), node.name)
    return found


def layer_of(weight: str) -> str:
    """The layer whose weight a constant is, by the constant's name."""
    return weight.removeprefix("model.").removeprefix("components.").removesuffix(".T").removesuffix(".weight")


def smooth(
    model: Any, nodes: set[str], alpha: float, peaks: Callable[[list[str]], Arrays], folder: Path | None = None
) -> int:
    """SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4): exact algebra, in place; returns how many norms changed.

    Outliers of single channels move from activations into weights, x / s and s * W with s = max|x|^a / max|W|^(1-a),
    where that is free at run time: the scale goes into the LayerNormalization before the layers, and only if all that
    read it are among `nodes`. `peaks(tensors)` gives max|x| per channel, float32 [channels], of each. `folder` has the
    weights that are not in the model itself.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    read = partial(read_tensor, folder=folder or Path())
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def movable(norm: Any) -> bool:
        after = readers.get(norm.output[0], [])
        axis = next((a.i for a in norm.attribute if a.name == "axis"), -1)
        weights = [len(constants[name].dims) if name in constants else 0 for name in norm.input[1:]]
        own = all(len(readers[node.input[1]]) == 1 for node in after)
        return bool(after) and own and axis == -1 and {*weights} == {1} and all(node.name in nodes for node in after)

    norms = [node for node in graph.node if node.op_type == "LayerNormalization" and movable(node)]
    found = peaks([norm.output[0] for norm in norms]) if norms else {}
    for norm in norms:
        layers = readers[norm.output[0]]
        # A linear layer's weight is [in, out], unless it is a Gemm that says that it is turned.
        turned = {node.name: any(a.name == "transB" and a.i for a in node.attribute) for node in layers}
        weights = {node.name: read(constants[node.input[1]]) for node in layers}
        rows = [np.abs(weight).max(axis=0 if turned[name] else 1) for name, weight in weights.items()]
        peak, weight_peak = found[norm.output[0]], np.max(rows, axis=0)
        used = (peak > 0) & (weight_peak > 0)
        scale = np.ones_like(peak)
        scale[used] = peak[used] ** alpha / weight_peak[used] ** (1 - alpha)
        for i in range(1, len(norm.input)):  # scale and bias, of which others may be readers
            name = f"{norm.name}.smooth.{i}"
            graph.initializer.append(numpy_helper.from_array(read(constants[norm.input[i]]) / scale, name))
            norm.input[i] = name
        for node in layers:
            name, by = node.input[1], scale if turned[node.name] else scale[:, None]
            constants[name].CopyFrom(numpy_helper.from_array(weights[node.name] * by, name))
    drop_unread(graph)
    return len(norms)


def insert(source: Path, nodes: list[str], samples: Iterable[Arrays], target: Path, symmetric: bool) -> None:
    """Write `source` with `nodes` quantised, the mechanics being ONNX Runtime's: weights int8, symmetric, per channel;
    activations uint8, per tensor, over the range seen in `samples`, or that range made `symmetric` about zero, which is
    then 128; biases and outputs stay in fp32."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[Arrays] = iter(samples)

        def get_next(self) -> Arrays | None:
            return next(self._left, None)

    chatter = logging.getLogger()
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # it advises, on the root logger, to fuse operators first
    try:
        quantize_static(
            source, target, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(WEIGHTED),
            nodes_to_quantize=nodes, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={
                "WeightSymmetric": True, "QuantizeBias": False, "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
                "ActivationSymmetric": symmetric,
            },
        )  # fmt: skip
    finally:
        chatter.setLevel(level)


def make_signed(source: Path, target: Path) -> int:
    """Write `source` with activations in int8 about zero, as TensorRT reads them, and return how many had to change.

    uint8 about 128 is int8 about 0, number for number; about another zero it is widened to a range that is symmetric,
    and loses up to one bit.
    """
    model = load(source)
    constants, widened = model.graph.initializers, set[str]()
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
            continue
        scale, zero = node.inputs[1], node.inputs[2]
        assert scale is not None
        assert zero is not None
        assert scale.const_value is not None
        assert zero.const_value is not None
        if zero.const_value.dtype != ir.DataType.UINT8:
            continue
        middle = int(zero.const_value.numpy())
        by = np.float32(max(middle / 128, (255 - middle) / 127))
        if by != 1:
            widened.add(str(scale.name))
        arrays = ((1, scale, scale.const_value.numpy() * by), (2, zero, np.zeros((), np.int8)))
        for place, value, array in arrays:
            name = f"{value.name}.signed"
            if name not in constants:
                constants.add(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
            node.replace_input_with(place, constants[name])
    for name, value in list(constants.items()):
        if not value.uses():
            del constants[name]
    ir.save(model, target, external_data=f"{target.name}.data")
    return len(widened)


def select(quantised: Any, original: Any, nodes: set[str], weights_only: bool) -> Any:
    """The graph of `original` with `nodes`, and nothing else, reading what `quantised` quantises.

    ONNX Runtime's quantiser gives a quantised tensor to all its readers, also to residual sums and norms, which then
    lose precision for nothing (and see passes/quantize.py for what OpenVINO makes of that).
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantised)
    before = {node.name: node for node in original.graph.node}
    for node in model.graph.node:
        if node.name in before and node.name not in nodes:
            node.input[:] = before[node.name].input
        elif node.name in before and weights_only:
            node.input[0] = before[node.name].input[0]
    drop_unread(model.graph)
    known = {tensor.name for tensor in model.graph.initializer}
    read = _read(model.graph)
    model.graph.initializer.extend(t for t in original.graph.initializer if t.name in read and t.name not in known)
    return model


def drop_unread(graph: Any) -> None:
    """Take out, in place, what no output of the graph depends on."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(read_by(node))
            kept.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    notes = [value for value in graph.value_info if value.name in wanted]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, constants), (graph.value_info, notes)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)


def _read(graph: Any) -> set[str]:
    return {name for node in graph.node for name in read_by(node)}


def read_by(node: Any) -> set[str]:
    """What a node reads, also within graphs of its own."""
    inner = [each.g for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]
    return {*node.input}.union(*(_read(graph) for graph in inner))


def save(model: Any, path: Path, folder: Path | None = None) -> None:
    """Write a graph with its weights beside it, one after the other; those that are not in the model itself are read
    from their file in `folder`. (onnx.save looks for the weights' file in the working directory.)"""
    whole = ir.from_proto(model)
    if folder:
        anchor(whole, folder)
    ir.save(whole, path, external_data=f"{path.name}.data")


def pack(source: Path, target: Path) -> None:
    """Copy a graph, whose weights may be in several files, with those that it has in one; tensor by tensor."""
    ir.save(ir.load(source), target, external_data=f"{target.name}.data")


def session(
    model: Path | bytes, weights: Path | None = None, mapped: bool = False
) -> Callable[[Mapping[str, Any]], Arrays]:
    """The graph as it is written: nothing fused, integers simulated in fp32, so that no engine's habits are in it.

    `weights`: where those of a graph lie that is not in a file. `mapped`: weights are used as they lie in their file,
    slower, and take no memory that cannot be given back. Arrays that it does not read may be given, too.
    """
    import onnxruntime

    from slipcast.engines import cpu_threads

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_threads()
    options.log_severity_level = 3  # it tells of weights that nothing reads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # many short ones, one after the other
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # What is made of weights, such as their rounding, is made when it is needed; the usual order has them all at once.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if isinstance(model, Path):
        graph, weights = onnx.load(model, load_external_data=False), model.parent
    else:
        graph = onnx.load_from_string(model)
    slices.slice_attention(graph)
    if weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    opened = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    reads, names = ([value.name for value in values] for values in (opened.get_inputs(), opened.get_outputs()))

    def run(arrays: Mapping[str, Any]) -> Arrays:
        return dict(zip(names, opened.run(None, {name: arrays[name] for name in reads}), strict=True))

    return run
