"""Operators of a traced graph in forms that the exporter knows, where it stops at others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ATEN = torch.ops.aten


def as_known(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program; it is another one only where an operator is in another form."""
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


FORMS = {
    _ATEN.as_strided_scatter.default: _put_strided,
    _ATEN.clamp.default: _clamp,
    _ATEN.copy.default: _copy,
    _ATEN.scaled_dot_product_attention.default: _attention,
}
_CALLED = {*FORMS, _ATEN.copy_.default}  # which becomes copy
