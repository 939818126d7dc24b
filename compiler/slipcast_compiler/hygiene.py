"""Graphs in the form that the engines read and fuse best."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def repair(graph: ir.Graph) -> None:
    """Mend what the exporter writes and an engine refuses, in place."""
    for node in list(graph):
        if node.op_type == "Squeeze":
            _drop_idle_squeeze(graph, node)
        elif node.op_type == "Attention":
            _widen_mask(graph, node)


def _drop_idle_squeeze(graph: ir.Graph, node: ir.Node) -> None:
    """torch's squeeze leaves an axis that is not 1 alone; ONNX's refuses it."""
    before, after = node.inputs[0], node.outputs[0]
    if before.shape and before.shape == after.shape:
        after.replace_all_uses_with(before)
        graph.remove(node, safe=True)


def _widen_mask(graph: ir.Graph, node: ir.Node) -> None:
    """A mask that is the same for all queries: ONNX lets it broadcast, ONNX Runtime asks for one row per query."""
    query, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or mask.shape is None or mask.shape[-2] != 1 or query.shape is None or query.shape[-2] == 1:
        return
    rows = query.shape[-2]
    assert isinstance(rows, int), "a denoiser's sizes are fixed"
    target = ir.tensor(np.array([rows, 1], np.int64), name=f"{node.name}.mask_shape")
    shape = ir.Value(name=target.name, const_value=target, type=ir.TensorType(target.dtype), shape=ir.Shape([2]))
    graph.register_initializer(shape)
    wide = ir.node("Expand", [mask, shape])
    wide.outputs[0].shape = ir.Shape([*mask.shape[:-2], rows, mask.shape[-1]])
    wide.outputs[0].type = mask.type
    graph.insert_before(node, wide)
    node.replace_input_with(3, wide.outputs[0])
