"""Broadcast late: what is the same for every image of a batch is computed once, and not once an image.

Exported models expand the timestep to the batch size before anything else, so that all that depends on it alone has a
batch, and could not leave the sampling loop. Here each such Expand is taken out, and its output is one row, with a 1
where the batch was. Operators that work row by row then make one row of it; where a row meets a true batch, the
operator broadcasts by itself; and where neither is certain, the row is expanded just before. Each rule is an identity
of the operator, so that the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from slipcast_compiler.graph.tidy import constant

# Operators whose output at a place depends on their inputs at that place alone, with numpy's broadcasting.
ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min",
    "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
    "Softplus", "Sqrt", "Sub", "Swish", "Tanh", "Where", "Xor",
})  # fmt: skip


class Row(NamedTuple):
    """What a value is that has one row instead of a batch: the axis of the batch, and the batch's size."""

    axis: int
    batch: ir.SymbolicDim


def broadcast_late(model: ir.Model) -> None:
    """Rewrite the graph in place. Its inputs, its outputs and what it computes stay."""
    graph, rows = model.graph, dict[ir.Value, Row]()
    for node in list(graph):
        if (row := _expanded(node)) and _places(graph.inputs, row.batch):
            node.outputs[0].replace_all_uses_with(_narrowed(graph, node, row, rows), replace_graph_outputs=True)
            graph.remove(node, safe=True)
            continue
        narrow = {i: rows[value] for i, value in enumerate(node.inputs) if value in rows}
        if not narrow:
            continue
        axes = _output_axes(node, narrow)
        if axes is None:
            for i, row in narrow.items():
                node.replace_input_with(i, _widen(graph, node, node.inputs[i], row))
            continue
        for output, axis in zip(node.outputs, axes, strict=True):
            if axis is not None:
                _mark(output, Row(axis, next(iter(narrow.values())).batch), rows)
    for i, output in enumerate(graph.outputs):
        if output in rows:
            wide = _widen(graph, None, output, rows[output])
            wide.name, output.name = output.name, f"{output.name}.row"
            graph.outputs[i] = wide
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def _expanded(node: ir.Node) -> Row | None:
    """The axis to which an Expand gives the batch's size, if that is all it does."""
    if node.op_type != "Expand" or node.inputs[0].shape is None or node.outputs[0].shape is None:
        return None
    before, after = node.inputs[0].shape, node.outputs[0].shape
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    if len(before) != len(after) or len(changed) != 1:
        return None
    axis = changed[0]
    batch = after[axis]
    named = isinstance(batch, ir.SymbolicDim) and batch.value is not None
    return Row(axis, batch) if named and before[axis] == 1 else None


def _narrowed(graph: ir.Graph, node: ir.Node, row: Row, rows: dict[ir.Value, Row]) -> ir.Value:
    """The input of an Expand under a value of its own, since that input may also be used as what it is."""
    single = ir.node("Identity", [node.inputs[0]])
    graph.insert_before(node, single)
    value = single.outputs[0]
    value.shape, value.type = node.outputs[0].shape.copy(), node.outputs[0].type
    _mark(value, row, rows)
    return value


def _mark(value: ir.Value, row: Row, rows: dict[ir.Value, Row]) -> None:
    rows[value] = row
    value.shape = ir.Shape([*value.shape[: row.axis], 1, *value.shape[row.axis + 1 :]])


def _widen(graph: ir.Graph, before: ir.Node | None, value: ir.Value, row: Row) -> ir.Value:
    """The value with a true batch again, for `before`, or for the graph's outputs."""
    others = before.inputs if before else ()
    # The batch of a value at hand, so that what depends on the prompt alone does not come to depend on the latent.
    places = [each for values in (others, graph.inputs) for each in sorted(_places(values, row.batch))]
    times, _, place, like = places[0]
    size = ir.node("Shape", [like], {"start": place, "end": place + 1})
    sizes = [size]
    if times > 1:
        sizes.append(ir.node("Mul", [*size.outputs, constant(graph, f"times_{times}", np.array([times]))]))
    ones = ir.node("Constant", [], {"value": ir.tensor(np.ones(len(value.shape) - row.axis - 1, np.int64))})
    target = ir.node(
        "Concat", [*sizes[-1].outputs, *ones.outputs], {"axis": 0}
    )  # Expand leaves the axes before as they are
    wide = ir.node("Expand", [value, *target.outputs])
    if before:
        graph.insert_before(before, [*sizes, ones, target, wide])
    else:
        graph.extend([*sizes, ones, target, wide])
    shape = [*value.shape[: row.axis], row.batch, *value.shape[row.axis + 1 :]]
    wide.outputs[0].shape, wide.outputs[0].type = ir.Shape(shape), value.type
    return wide.outputs[0]


def _places(values: Iterable[ir.Value | None], batch: ir.SymbolicDim) -> list[tuple[int, int, int, ir.Value]]:
    """Where a batch's size is told: how many times, by which of the values, in which dimension, and that value."""
    return [
        (times, at, dim, value)
        for at, value in enumerate(values)
        if value is not None and value.shape is not None
        for dim, size in enumerate(value.shape)
        if (times := _times(batch, size))
    ]


def _times(batch: ir.SymbolicDim, size: int | ir.SymbolicDim) -> int:
    """How many times a size the batch's is, as they are called: 2*images and images; 0 where they have nothing to do
    with each other."""
    if isinstance(size, int) or size.value is None:
        return 0
    times, _, name = str(batch.value).rpartition("*")
    if str(size.value) == str(batch.value):
        return 1
    return int(times) if times.isdigit() and name == size.value else 0


def _output_axes(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    """For each output the axis on which it is a row, or None where it has its batch; None where no rule holds."""
    rule = _elementwise if node.op_type in ELEMENTWISE else _RULES.get(node.op_type)
    known = all(value is None or value.shape is not None for value in (*node.inputs, *node.outputs))
    if rule is None or not known or len({row.batch for row in narrow.values()}) != 1:
        return None
    if node.op_type not in ELEMENTWISE and node.op_type != "Concat" and narrow.keys() != {0}:
        return None  # a row where the operator takes weights, or indices
    return rule(node, narrow)


def _elementwise(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    places = {row.axis - len(node.inputs[i].shape) for i, row in narrow.items()}  # counted from the right
    if len(places) != 1:
        return None
    place = places.pop()
    wide = [v.shape for i, v in enumerate(node.inputs) if v is not None and i not in narrow]
    sizes = {shape[place] for shape in wide if -place <= len(shape)}
    if sizes <= {1}:
        return [len(node.outputs[0].shape) + place]
    return [None] if sizes <= {1, narrow[min(narrow)].batch} else None


def _unsqueeze(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    rank, axes = len(node.outputs[0].shape), _constant(node.inputs[1])
    if axes is None:
        return None
    return [[i for i in range(rank) if i not in {axis % rank for axis in axes}][narrow[0].axis]]


def _transpose(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    rank = len(node.outputs[0].shape)
    order = node.attributes.get_ints("perm", list(range(rank))[::-1])
    return [list(order).index(narrow[0].axis)]


def _reshape(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    """Reshapes that leave a leading batch alone."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    static = all(isinstance(d, int) for d in (*before[1:], *after[1:]))
    if narrow[0].axis != 0 or after[0] != narrow[0].batch or not static:
        return None
    shape = ir.tensor(np.array([1, *after[1:]], np.int64), name=f"{node.outputs[0].name}.shape")
    value = ir.Value(name=shape.name, const_value=shape, type=ir.TensorType(shape.dtype), shape=ir.Shape(shape.shape))
    node.graph.register_initializer(value)
    node.replace_input_with(1, value)
    return [0]


def _along_another_axis(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    rank, place = len(node.inputs[0].shape), narrow[min(narrow)].axis
    axis = node.attributes.get_int("axis", -1 if node.op_type == "Softmax" else 0) % rank
    everywhere = node.op_type != "Concat" or len(narrow) == len(node.inputs)
    alike = {row.axis for row in narrow.values()} == {place}
    return [place] * len(node.outputs) if everywhere and alike and place != axis else None


def _normalization(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    rank, place = len(node.inputs[0].shape), narrow[min(narrow)].axis
    inside = place >= node.attributes.get_int("axis", -1) % rank
    return None if inside or len(node.outputs) > 1 else [place]


def _slice(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    axes = _constant(node.inputs[3]) if len(node.inputs) > 3 else None
    rank = len(node.inputs[0].shape)
    return None if axes is None or narrow[0].axis in {axis % rank for axis in axes} else [narrow[0].axis]


def _gemm(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    vector = len(node.inputs) < 3 or len(node.inputs[2].shape) < 2  # a bias that is the same for every row
    rowwise = narrow[0].axis == 0 and not node.attributes.get_int("transA", 0)
    return [0] if vector and rowwise else None


def _matmul(node: ir.Node, narrow: Mapping[int, Row]) -> list[int | None] | None:
    left, right = (value.shape for value in node.inputs)
    return [narrow[0].axis] if narrow[0].axis < len(left) - 1 and len(right) == 2 else None


def _constant(value: ir.Value) -> list[int] | None:
    return None if value.const_value is None else [int(i) for i in value.const_value.numpy()]


_RULES: dict[str, Callable[[ir.Node, Mapping[int, Row]], list[int | None] | None]] = {
    "Unsqueeze": _unsqueeze, "Transpose": _transpose, "Reshape": _reshape, "Slice": _slice, "Gemm": _gemm,
    "MatMul": _matmul, "Concat": _along_another_axis, "Split": _along_another_axis, "Softmax": _along_another_axis,
    "LayerNormalization": _normalization, "RMSNormalization": _normalization,
}  # fmt: skip
