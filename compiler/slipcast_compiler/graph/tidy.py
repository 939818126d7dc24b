"""Graphs in the form that the engines read and fuse best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def tidy(graph: ir.Graph) -> None:
    """Rewrite in place: what an engine refuses, and what it runs slowly. What the graph computes stays."""
    for node in list(graph):
        if node.op_type in _REWRITES:
            _REWRITES[node.op_type](graph, node)


def _drop_idle_squeeze(graph: ir.Graph, node: ir.Node) -> None:
    """torch's squeeze leaves an axis that is not 1 alone; ONNX's refuses it."""
    before, after = node.inputs[0], node.outputs[0]
    if before.shape and before.shape == after.shape:
        after.replace_all_uses_with(before)
        graph.remove(node, safe=True)


def _reshape_instead(graph: ir.Graph, node: ir.Node) -> None:
    """What OpenVINO makes of an Unsqueeze itself, and forgets then that it was to stay in fp32 (build/openvino.py): it
    is the first thing that happens to a timestep."""
    after = node.outputs[0]
    free = [not isinstance(size, int) for size in after.shape or [None, None]]
    if sum(free) > 1:
        return
    sizes = [-1 if unknown else size for unknown, size in zip(free, after.shape, strict=True)]
    shape = constant(graph, "to_" + "_".join(map(str, sizes)), np.array(sizes))
    reshape = ir.node("Reshape", [node.inputs[0], shape], name=node.name)
    _describe(reshape, after, after.shape)
    graph.insert_before(node, reshape)
    after.replace_all_uses_with(reshape.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    reshape.outputs[0].name = after.name


def _widen_places(graph: ir.Graph, node: ir.Node) -> None:
    """Places in int32, which torch takes, and ONNX does not."""
    places = node.inputs[1]
    if places is None or places.dtype != ir.DataType.INT32:
        return
    cast = ir.node("Cast", [places], {"to": ir.DataType.INT64})
    cast.outputs[0].shape, cast.outputs[0].dtype = places.shape, ir.DataType.INT64
    graph.insert_before(node, cast)
    node.replace_input_with(1, cast.outputs[0])


def _widen_mask(graph: ir.Graph, node: ir.Node) -> None:
    """A mask that is the same for all queries: ONNX lets it broadcast, ONNX Runtime asks for a row per query."""
    query, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or mask.shape is None or mask.shape[-2] != 1 or query.shape is None or query.shape[-2] == 1:
        return
    rows = query.shape[-2]
    if isinstance(rows, int):
        size = constant(graph, f"rows_{rows}", np.array([rows, 1]))
    else:
        own = ir.node("Shape", [query], {"start": -2, "end": -1})
        both = ir.node("Concat", [own.outputs[0], constant(graph, "one_key", np.array([1]))], {"axis": 0})
        graph.insert_before(node, [own, both])
        size = both.outputs[0]
        for each, count in ((own, 1), (both, 2)):
            each.outputs[0].shape, each.outputs[0].type = ir.Shape([count]), ir.TensorType(ir.DataType.INT64)
    wide = ir.node("Expand", [mask, size])
    _describe(wide, mask, [*mask.shape[:-2], rows, mask.shape[-1]])
    graph.insert_before(node, wide)
    node.replace_input_with(3, wide.outputs[0])


def _choose_truths(graph: ir.Graph, node: ir.Node) -> None:
    """One of two masks, by a third: for ONNX Runtime that is logic, it has no Where of booleans."""
    condition, yes, no = node.inputs
    if node.outputs[0].dtype != ir.DataType.BOOL:
        return
    other = ir.node("Not", [condition])
    both = [ir.node("And", [condition, yes]), ir.node("And", [other.outputs[0], no])]
    either = ir.node("Or", [each.outputs[0] for each in both], name=node.name)
    if condition.shape is not None:
        _describe(other, condition, condition.shape)
    for each in (*both, either):  # their own shapes may be smaller; only what comes of them is known
        each.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    either.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, [other, *both, either])
    node.outputs[0].replace_all_uses_with(either.outputs[0], replace_graph_outputs=True)
    either.outputs[0].name, node.outputs[0].name = node.outputs[0].name, None
    graph.remove(node, safe=True)


def _spell_out_group_norm(graph: ir.Graph, node: ir.Node) -> None:
    """As instance normalisation of [batch, groups, rest], then scale and shift.

    ONNX Runtime's operator is slower than these five and less exact (the variance as a difference of means: 1e-3 off
    where a group's mean is 60 times its deviation, here 1e-5), and OpenVINO breaks it up into them itself, with
    arithmetic on shapes at run time where the batch is free.
    """
    x, *weights = node.inputs
    if x.shape is None or not isinstance(x.shape[1], int):
        return
    groups, epsilon = node.attributes.get_int("num_groups"), node.attributes.get_float("epsilon", 1e-5)
    sizes = list(x.shape[1:])
    scale, bias = (_along_channels(graph, node, weight, len(sizes)) for weight in weights)
    name = f"groups_{groups}"
    ones = constant(graph, f"{name}_ones", np.ones(groups, np.float32))
    zeros = constant(graph, f"{name}_zeros", np.zeros(groups, np.float32))
    grouped = ir.node("Reshape", [x, constant(graph, name, np.array([0, groups, -1]))])
    normal = ir.node("InstanceNormalization", [*grouped.outputs, ones, zeros], {"epsilon": epsilon})
    if free := any(not isinstance(size, int) for size in sizes):
        shape = ir.node("Shape", [x])
        shape.outputs[0].shape, shape.outputs[0].type = ir.Shape([len(x.shape)]), ir.TensorType(ir.DataType.INT64)
        target = shape.outputs[0]
    else:
        target = constant(graph, "sizes_" + "_".join(map(str, sizes)), np.array([0, *sizes]))
    again = ir.node("Reshape", [*normal.outputs, target])
    scaled = ir.node("Mul", [*again.outputs, scale])
    shifted = ir.node("Add", [*scaled.outputs, bias])
    rest = ir.SymbolicDim(None) if free else int(np.prod(sizes)) // groups
    for each in (grouped, normal):
        _describe(each, x, [x.shape[0], groups, rest])
    for each in (again, scaled, shifted):
        _describe(each, x, x.shape)
    graph.insert_before(node, [grouped, normal, *([shape] if free else []), again, scaled, shifted])
    node.outputs[0].replace_all_uses_with(shifted.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _along_channels(graph: ir.Graph, node: ir.Node, weight: ir.Value, dims: int) -> ir.Value:
    """A weight of a normalisation as [channels, 1, ...]: reshaped itself, or a copy where others have it too."""
    target = [-1, *(1 for _ in range(dims - 1))]
    if weight.const_value is None:  # computed, where the normalisation has none of its own
        reshaped = ir.node("Reshape", [weight, constant(graph, f"channels_{dims}", np.array(target))])
        graph.insert_before(node, reshaped)
        return reshaped.outputs[0]
    values = weight.const_value.numpy().reshape(target)
    if len(weight.uses()) > 1:
        return constant(graph, f"{weight.name}_{dims}", values)
    weight.const_value, weight.shape = ir.tensor(values, name=weight.name), ir.Shape(values.shape)
    return weight


def constant(graph: ir.Graph, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
    """An initialiser of the graph, the same for all who ask for it by name."""
    if name not in graph.initializers:
        tensor = ir.tensor(values, name=name)
        shape = ir.Shape(values.shape)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
        graph.register_initializer(value)
    return graph.initializers[name]


def _describe(node: ir.Node, like: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> None:
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), like.type


_REWRITES = {
    "Squeeze": _drop_idle_squeeze, "Unsqueeze": _reshape_instead, "Attention": _widen_mask,
    "GroupNormalization": _spell_out_group_norm, "GatherND": _widen_places, "Where": _choose_truths,
}  # fmt: skip
