"""Complex numbers in a traced graph (rotary embeddings) as pairs of reals, for operators that move numbers alone: those
exist in ONNX for reals. The exporter knows the rest, arithmetic among it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_ATEN = torch.ops.aten
_PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def as_pairs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, with a last dimension of two while complex numbers are moved."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    if not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values):
        return program
    return program.run_decompositions(_MOVES | _MADE)


def _moved(move: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Of a complex tensor: `move` is given its pairs, and the operator's other arguments."""

    def decomposed(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.is_complex():
            return NotImplemented
        return torch.view_as_complex(move(torch.view_as_real(x), *args, **kwargs).contiguous())

    return decomposed


def _made(make: Callable[..., torch.Tensor], like: bool = False) -> Callable[..., Any]:
    """Of complex numbers that are real: make(first argument, *others, dtype) with the dtype of their parts. `like`:
    whether the first argument is a tensor, which gives the dtype, too, where none is said."""

    def decomposed(first: Any, *others: Any, dtype: Any = None, **_: Any) -> Any:
        dtype = dtype or (first.dtype if like else torch.get_default_dtype())
        if dtype not in _PARTS:
            return NotImplemented
        real = make(first, *others, dtype=_PARTS[dtype])
        return torch.view_as_complex(torch.stack([real, torch.zeros_like(real)], dim=-1))

    return decomposed


def _before(dim: int) -> int:
    """The same dimension of the pairs."""
    return dim if dim >= 0 else dim - 1


def _split_with_sizes(x: torch.Tensor, sizes: Sequence[Any], dim: int = 0) -> Any:
    if not x.is_complex():
        return NotImplemented
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [_ATEN.slice.Tensor(x, dim, end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    if not (x.is_complex() and source.is_complex()):
        return NotImplemented
    return torch.view_as_complex(torch.view_as_real(source).expand(*x.shape, 2).contiguous())


def _scattered(scatter: Any) -> Callable[..., Any]:
    def decomposed(x: torch.Tensor, source: torch.Tensor, dim: int = 0, *where: Any, **named: Any) -> Any:
        if not x.is_complex():
            return NotImplemented
        pairs = torch.view_as_real(x), torch.view_as_real(source)
        return torch.view_as_complex(scatter(*pairs, _before(dim), *where, **named).contiguous())

    return decomposed


def _pad_sequence(
    xs: Sequence[torch.Tensor], batch_first: bool = False, padding_value: float = 0, padding_side: str = "right"
) -> Any:
    if not xs[0].is_complex() or padding_value:
        return NotImplemented
    pairs = [torch.view_as_real(x) for x in xs]
    return torch.view_as_complex(_ATEN.pad_sequence.default(pairs, batch_first, padding_value, padding_side))


def _of_one_width(operator: Any) -> Callable[..., Any]:
    """Arithmetic on complex numbers of two widths, in the wider one."""

    def decomposed(x: torch.Tensor, y: Any, **named: Any) -> Any:
        if not isinstance(y, torch.Tensor) or not (x.is_complex() and y.is_complex()) or x.dtype == y.dtype:
            return NotImplemented
        part = _PARTS[torch.promote_types(x.dtype, y.dtype)]
        wide = [torch.view_as_complex(torch.view_as_real(each).to(part)) for each in (x, y)]
        return operator(*wide, **named)

    return decomposed


def _to_copy(x: torch.Tensor, *, dtype: Any = None, **_: Any) -> Any:
    if not x.is_complex() or (dtype and dtype not in _PARTS):
        return NotImplemented
    return torch.view_as_complex(torch.view_as_real(x).to(_PARTS[dtype or x.dtype]))


def _gather(x: torch.Tensor, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> torch.Tensor:
    return x.gather(_before(dim), index.unsqueeze(-1).expand(*index.shape, 2))


def _pad(x: torch.Tensor, pad: Sequence[Any], value: float = 0) -> torch.Tensor:
    assert not value, "a number that is not zero has no imaginary part"
    return _ATEN.constant_pad_nd.default(x, [0, 0, *pad], 0)


_MOVES: dict[Any, Callable[..., Any]] = {
    _ATEN._to_copy.default: _to_copy,
    _ATEN.add.Tensor: _of_one_width(_ATEN.add.Tensor),
    _ATEN.mul.Tensor: _of_one_width(_ATEN.mul.Tensor),
    _ATEN.sub.Tensor: _of_one_width(_ATEN.sub.Tensor),
    _ATEN.alias.default: _moved(lambda x: x),
    _ATEN.constant_pad_nd.default: _moved(_pad),
    _ATEN.copy.default: _copy,
    _ATEN.detach.default: _moved(lambda x: x),
    _ATEN.expand.default: _moved(lambda x, size, *, implicit=False: x.expand(*size, 2)),
    _ATEN.flatten.using_ints: _moved(lambda x, start=0, end=-1: x.flatten(_before(start), _before(end))),
    _ATEN.gather.default: _moved(_gather),
    _ATEN.index.Tensor: _moved(lambda x, indices: _ATEN.index.Tensor(x, indices)),
    _ATEN.index_select.default: _moved(lambda x, dim, index: x.index_select(_before(dim), index)),
    _ATEN.pad_sequence.default: _pad_sequence,
    _ATEN.repeat.default: _moved(lambda x, repeats: x.repeat(*repeats, 1)),
    _ATEN.reshape.default: _moved(lambda x, shape: x.reshape(*shape, 2)),
    _ATEN.select.int: _moved(lambda x, dim, index: x.select(_before(dim), index)),
    _ATEN.select_scatter.default: _scattered(_ATEN.select_scatter.default),
    _ATEN.slice_scatter.default: _scattered(_ATEN.slice_scatter.default),
    _ATEN.split_with_sizes.default: _split_with_sizes,
    _ATEN.squeeze.dims: _moved(lambda x, dims: x.squeeze(tuple(map(_before, dims)))),
    _ATEN.unsqueeze.default: _moved(lambda x, dim: x.unsqueeze(_before(dim))),
}
_MADE: dict[Any, Callable[..., Any]] = {
    _ATEN.full.default: _made(torch.full),
    _ATEN.ones.default: _made(torch.ones),
    _ATEN.zeros.default: _made(torch.zeros),
    _ATEN.full_like.default: _made(lambda x, value, dtype: torch.full(x.shape, value, dtype=dtype), like=True),
    _ATEN.ones_like.default: _made(lambda x, dtype: torch.ones(x.shape, dtype=dtype), like=True),
    _ATEN.zeros_like.default: _made(lambda x, dtype: torch.zeros(x.shape, dtype=dtype), like=True),
    _ATEN.new_full.default: _made(lambda _, size, value, dtype: torch.full(size, value, dtype=dtype), like=True),
    _ATEN.new_ones.default: _made(lambda _, size, dtype: torch.ones(size, dtype=dtype), like=True),
    _ATEN.new_zeros.default: _made(lambda _, size, dtype: torch.zeros(size, dtype=dtype), like=True),
}
