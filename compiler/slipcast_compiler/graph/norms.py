"""Normalisation that sees the whole where a graph is run on a part: group norms whose statistics are given.

In tiles a group norm sees a tile, where it would see the whole picture, and colours and contrast of tiles differ. Here
a graph takes the mean and the deviation of every group of every norm besides, and gives those that it took: its own,
where it is given none. Run once on a latent that was made as small as a tile, it gives what all tiles are run with
(the "fast mode" of Tiled VAE, github.com/pkuliyi2015/multidiffusion-upscaler-for-automatic1111, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from slipcast_compiler.graph.tidy import constant

GIVEN, TAKEN = "statistics", "statistics_taken"  # the input and the output: float32 [size]


def give_statistics(graph: ir.Graph) -> int:
    """Rewrite in place; the number of statistics. They are 0 where there are none to give, as no deviation is."""
    norms = [node for node in graph if _is_norm(node)]
    if not norms:
        return 0
    given = ir.Value(name=GIVEN, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2 * sum(map(_groups, norms))]))
    at, taken = 0, list[ir.Value]()
    for node in norms:
        count = _groups(node)
        taken += _rewrite(graph, node, given, at, count)
        at += 2 * count
    joined = _add(graph, "Concat", taken, [at], attributes={"axis": 0})
    joined.name = TAKEN
    graph.inputs.append(given)
    graph.outputs.append(joined)
    return at


def _is_norm(node: ir.Node) -> bool:
    """Of groups, or channels, that are as many whatever the size of the picture."""
    if node.op_type != "InstanceNormalization" or not (shape := node.inputs[0] and node.inputs[0].shape):
        return False
    return len(shape) > 2 and all(isinstance(size, int) for size in shape[:2])


def _groups(node: ir.Node) -> int:
    """How many it has, of all images."""
    images, groups = _sizes(node)[:2]
    return images * groups


def _sizes(node: ir.Node) -> list[int]:
    """Of its input; -1 for those that are free."""
    value = node.inputs[0]
    assert value is not None
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def _rewrite(graph: ir.Graph, node: ir.Node, given: ir.Value, at: int, count: int) -> list[ir.Value]:
    """The norm by its own arithmetic; the means and the deviations that it took, each [count]."""
    x, scale, shift = node.inputs
    assert x is not None
    assert scale is not None
    assert shift is not None
    assert x.shape is not None
    whole, rank = list(x.shape), len(x.shape)
    small = [*_sizes(node)[:2], *[1] * (rank - 2)]
    axes = constant(graph, f"axes_to_{rank}", np.arange(2, rank))
    epsilon = constant(graph, f"{node.name}_epsilon", np.array(node.attributes.get_float("epsilon", 1e-5), np.float32))
    kept = {"keepdims": 1}

    def told(start: int) -> ir.Value:
        ends = [constant(graph, f"at_{end}", np.array([end])) for end in (start, start + count)]
        part = _add(graph, "Slice", [given, *ends], [count], before=node)
        return _add(graph, "Reshape", [part, _shape(graph, small)], small, before=node)

    own_mean = _add(graph, "ReduceMean", [x, axes], small, kept, node)
    centred = _add(graph, "Sub", [x, own_mean], whole, before=node)
    squares = _add(graph, "Mul", [centred, centred], whole, before=node)
    variance = _add(graph, "ReduceMean", [squares, axes], small, kept, node)
    own = _add(graph, "Sqrt", [_add(graph, "Add", [variance, epsilon], small, before=node)], small, before=node)
    mean, deviation = told(at), told(at + count)
    zero = constant(graph, "no_deviation", np.array(0, np.float32))
    is_given = _add(graph, "Greater", [deviation, zero], small, before=node, dtype=ir.DataType.BOOL)
    mean = _add(graph, "Where", [is_given, mean, own_mean], small, before=node)
    deviation = _add(graph, "Where", [is_given, deviation, own], small, before=node)
    found = _add(graph, "Div", [_add(graph, "Sub", [x, mean], whole, before=node), deviation], whole, before=node)
    for operator, value, idle in (("Mul", scale, 1), ("Add", shift, 0)):
        if value.const_value is None or (value.const_value.numpy() != idle).any():
            channels = _add(graph, "Reshape", [value, _shape(graph, [1, *small[1:]])], [1, *small[1:]], before=node)
            found = _add(graph, operator, [found, channels], whole, before=node)
    flat = _shape(graph, [-1])
    taken = [_add(graph, "Reshape", [value, flat], [count], before=node) for value in (mean, deviation)]
    node.outputs[0].replace_all_uses_with(found, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for value in (scale, shift):
        if not value.uses():
            graph.initializers.pop(str(value.name), None)
    return taken


def _shape(graph: ir.Graph, sizes: Sequence[int]) -> ir.Value:
    return constant(graph, "to_" + "_".join(map(str, sizes)), np.array(sizes))


def _add(
    graph: ir.Graph, operator: str, inputs: Sequence[ir.Value], shape: Sequence[object],
    attributes: dict[str, int] | None = None, before: ir.Node | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:  # fmt: skip
    """The output of a new node; at the end of the graph, or before another node."""
    node = ir.node(operator, inputs, attributes or {})
    graph.insert_before(before, node) if before else graph.append(node)
    value = node.outputs[0]
    value.shape, value.dtype = ir.Shape(shape), dtype
    return value
