"""Operators of a traced graph in forms that the exporter knows, where it stops at others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ATEN = torch.ops.aten


def as_known(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program; it is another one only where an operator is in another form."""
    _spell_out_nearest(program)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return program.run_decompositions(dict(FORMS)) if called & _CALLED else program


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, *args: Any, **kw: Any
) -> Any:
    """Attention of one head, without a dimension for heads: ONNX's operator has one. Of many queries with the same keys
    and values, which torch lets broadcast, and ONNX Runtime does not."""
    batches = {each.shape[0] for each in (query, key, value) if each.ndim == 4 and isinstance(each.shape[0], int)}
    if len(batches) == 2 and 1 in batches:
        wide = (each.expand(max(batches), *each.shape[1:]) for each in (query, key, value))
        return _ATEN.scaled_dot_product_attention.default(*wide, mask, *args, **kw)
    if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
        return NotImplemented
    mask = kw.pop("attn_mask", mask)
    mask = mask.unsqueeze(-3) if mask is not None and mask.ndim == 3 else mask
    heads = (each.unsqueeze(1) for each in (query, key, value))
    return _ATEN.scaled_dot_product_attention.default(*heads, mask, *args, **kw).squeeze(1)


def _clamp(x: torch.Tensor, low: Any = None, high: Any = None) -> Any:
    """Bounds of one kind: the exporter's type promotion stops at an integer beside a float."""
    if not x.is_floating_point() or {type(low), type(high)} != {int, float}:
        return NotImplemented
    return _ATEN.clamp.default(x, float(low), float(high))


def _copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    """The exporter's own gives the source as it is, of whatever shape and dtype."""
    return source.to(x.dtype).expand(x.shape)


def _put_strided(
    x: torch.Tensor, source: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Any:
    """By places in the tensor's memory, in which it lies row by row."""
    places = torch.arange(x.numel()).as_strided(size, stride, offset or 0).flatten()
    return _ATEN.scatter.src(x.reshape(-1), 0, places, source.reshape(-1)).reshape(x.shape)


def _spell_out_nearest(program: torch.export.ExportedProgram) -> None:
    """What is resized to "nearest-exact", by the places that it takes; in place. Of these torch has decompositions that
    its exporter lists, and does not come to: an operator with a kernel of its own keeps that."""
    graph = program.graph
    for node in [node for node in graph.nodes if node.target in NEAREST]:
        taken, sizes = node.args[0], node.meta["val"].shape[2:]
        if not all(isinstance(size, int) for size in (*sizes, *taken.meta["val"].shape[2:])):
            continue
        asked = node.args[2:] if node.target._overloadname == "default" else (node.args[2:] or (None,))[0]
        scales = dict(enumerate(asked or (), 2))
        with graph.inserting_before(node):
            for dim, size in enumerate(sizes, 2):
                step = taken.meta["val"].shape[dim] / size if scales.get(dim) is None else 1 / scales[dim]
                place = _call(graph, _ATEN.arange.default, size, fake=taken.meta["val"].fake_mode)
                place = _call(graph, _ATEN._to_copy.default, place, dtype=torch.float32)
                place = _call(graph, _ATEN.mul.Tensor, _call(graph, _ATEN.add.Tensor, place, 0.5), step)
                place = _call(
                    graph, _ATEN._to_copy.default, _call(graph, _ATEN.floor.default, place), dtype=torch.int64
                )
                taken = _call(graph, _ATEN.index_select.default, taken, dim, place)
        node.replace_all_uses_with(taken)
        graph.erase_node(node)
    program.graph_module.recompile()


def _call(graph: torch.fx.Graph, operator: Any, *args: Any, fake: Any = None, **kwargs: Any) -> torch.fx.Node:
    """A node that calls it, with what it gives noted as the tracer does."""
    node = graph.call_function(operator, args, kwargs)
    given = [each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in args]
    with fake or next(each.fake_mode for each in given if isinstance(each, torch.Tensor)):
        node.meta["val"] = operator(*given, **kwargs)
    return node


NEAREST = frozenset(
    getattr(getattr(_ATEN, f"_upsample_nearest_exact{dims}d"), overload)
    for dims in (1, 2, 3)
    for overload in ("default", "vec")
)
FORMS = {
    _ATEN.as_strided_scatter.default: _put_strided,
    _ATEN.clamp.default: _clamp,
    _ATEN.copy.default: _copy,
    _ATEN.scaled_dot_product_attention.default: _attention,
}
_CALLED = {*FORMS, _ATEN.copy_.default}  # which becomes copy
