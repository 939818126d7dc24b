"""Complex numbers in a traced graph (rotary embeddings) as pairs of reals, for operators that move numbers alone: those
exist in ONNX for reals. The exporter knows the rest, arithmetic among it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ATEN = torch.ops.aten


def as_pairs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, with a last dimension of two while complex numbers are moved."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    if not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values):
        return program
    return program.run_decompositions(
        {
            _ATEN.unsqueeze.default: _unsqueeze,
            _ATEN.expand.default: _expand,
            _ATEN.split_with_sizes.default: _split_with_sizes,
            _ATEN.index.Tensor: _index,
        }
    )


def _unsqueeze(x: torch.Tensor, dim: int) -> Any:
    if not x.is_complex():
        return NotImplemented
    return torch.view_as_complex(torch.view_as_real(x).unsqueeze(dim if dim >= 0 else dim - 1))


def _expand(x: torch.Tensor, size: Sequence[Any], *, implicit: bool = False) -> Any:
    return torch.view_as_complex(torch.view_as_real(x).expand(*size, 2)) if x.is_complex() else NotImplemented


def _split_with_sizes(x: torch.Tensor, sizes: Sequence[Any], dim: int = 0) -> Any:
    if not x.is_complex():
        return NotImplemented
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [_ATEN.slice.Tensor(x, dim, end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _index(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    if not x.is_complex():
        return NotImplemented
    return torch.view_as_complex(_ATEN.index.Tensor(torch.view_as_real(x), indices))
