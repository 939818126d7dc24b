"""Arrays of numpy that remember which tensor they are: what a pipeline makes of a picture's numbers, until it makes a
tensor of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

Root = list[bool]  # whether a tensor was made of an array, or of what was computed from it
_UFUNCS: dict[Any, Callable[..., Any]] = {
    np.add: torch.add,
    np.subtract: torch.sub,
    np.multiply: torch.mul,
    np.true_divide: torch.div,
    np.negative: torch.neg,
    np.less: torch.lt,
    np.less_equal: torch.le,
    np.greater: torch.gt,
    np.greater_equal: torch.ge,
}


class Pixels(np.ndarray[Any, np.dtype[Any]]):
    """`tensor`: of the same shape and numbers; None where that is not known, and where it is no more. `roots`: of the
    pictures that it comes from."""

    tensor: torch.Tensor | None = None
    roots: tuple[Root, ...] = ()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        made = getattr(ufunc, method)(*map(_plain, inputs), **{name: _plain(each) for name, each in kwargs.items()})
        if method != "__call__" or kwargs or ufunc not in _UFUNCS or not _is_exact(made):
            return made
        return _remembering(made, lambda: _UFUNCS[ufunc](*map(_tensor, _in_one_type(inputs, made))), inputs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        plain = [[_plain(each) for each in arg] if isinstance(arg, list | tuple) else _plain(arg) for arg in args]
        made = func(*plain, **kwargs)
        axis = kwargs.get("axis", args[1] if len(args) > 1 else 0)
        if func in (np.stack, np.concatenate) and set(kwargs) <= {"axis"}:
            join = torch.stack if func is np.stack else torch.cat
            return _remembering(made, lambda: join([_tensor(each) for each in args[0]], dim=axis), args[0])
        if func is np.expand_dims:
            return _remembering(made, lambda: _tensor(args[0]).unsqueeze(axis), args[:1])
        if func is np.transpose:
            axes = kwargs.get("axes", args[1] if len(args) > 1 else None)
            return args[0].transpose(axes)
        return made

    def __getitem__(self, key: Any) -> Any:
        made = super().__getitem__(_plain(key))
        keys = key if isinstance(key, tuple) else (key,)
        if not all(each is None or each is Ellipsis or isinstance(each, int) or _is_forward(each) for each in keys):
            return _plain(made)
        return _remembering(made, lambda: _tensor(self)[key], [self])

    def __setitem__(self, key: Any, value: Any) -> None:
        known = isinstance(key, Pixels) and key.tensor is not None and self.tensor is not None
        self.tensor = torch.where(_tensor(key), value, _tensor(self)) if known and np.isscalar(value) else None
        np.asarray(self.view(np.ndarray))[_plain(key)] = _plain(value)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        made = self.view(np.ndarray).astype(dtype, *args, **kwargs)
        exact = _is_exact(made) or made.dtype == self.dtype
        return _remembering(made, lambda: _tensor(self).to(_type_of(made)), [self]) if exact else made

    def transpose(self, *axes: Any) -> Any:
        made = self.view(np.ndarray).transpose(*axes)
        order = (axes[0] if len(axes) == 1 else axes) or tuple(reversed(range(self.ndim)))
        return _remembering(made, lambda: _tensor(self).permute(tuple(order)), [self])

    def reshape(self, *shape: Any, **kwargs: Any) -> Any:
        made = self.view(np.ndarray).reshape(*shape, **kwargs)
        return _remembering(made, lambda: _tensor(self).reshape(made.shape), [self]) if not kwargs else made


def remember(array: Any, tensor: torch.Tensor, *roots: Root) -> Pixels:
    """The array, which from here on is this tensor."""
    found: Pixels = np.asarray(array).view(Pixels)
    found.tensor, found.roots = tensor, roots
    return found


@contextlib.contextmanager
def tensors_of_pixels() -> Iterator[None]:
    """Within it, torch.from_numpy gives the tensor that an array remembers."""
    usual = torch.from_numpy

    def from_numpy(array: Any) -> torch.Tensor:
        if not isinstance(array, Pixels) or array.tensor is None:
            made: torch.Tensor = usual(_plain(array))
            return made
        for root in array.roots:
            root[0] = True
        return array.tensor.to(_type_of(array))

    torch.from_numpy = from_numpy
    try:
        yield
    finally:
        torch.from_numpy = usual


def _remembering(made: Any, tensor: Callable[[], torch.Tensor], given: Sequence[Any]) -> Any:
    """What numpy made of arrays, with what torch makes of their tensors; plain where one of those is not known."""
    pixels = [each for each in given if isinstance(each, Pixels)]
    if not isinstance(made, np.ndarray) or not pixels or any(each.tensor is None for each in pixels):
        return _plain(made)
    return remember(made, tensor(), *(root for each in pixels for root in each.roots))


def _is_forward(key: Any) -> bool:
    return isinstance(key, slice) and (key.step is None or key.step > 0)


def _in_one_type(inputs: Sequence[Any], made: Any) -> list[Any]:
    """As numpy computes: in the type of the result; of a comparison, in that of what is compared."""
    kinds = [_type_of(each) for each in inputs if isinstance(each, np.ndarray)]
    kind = _type_of(made) if made.dtype != bool else max(kinds, key=lambda each: each.itemsize)
    return [_tensor(each).to(kind) if isinstance(each, np.ndarray) else each for each in inputs]


def _tensor(value: Any) -> Any:
    if isinstance(value, Pixels) and value.tensor is not None:
        return value.tensor
    return torch.from_numpy(np.ascontiguousarray(_plain(value))) if isinstance(value, np.ndarray) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    return value.view(np.ndarray) if isinstance(value, Pixels) else value


def _is_exact(made: Any) -> bool:
    """Whether torch, which knows the numbers as floats, computes the same."""
    return isinstance(made, np.ndarray) and made.dtype in (np.float32, np.float64, np.bool_)


def _type_of(array: Any) -> torch.dtype:
    return {"float64": torch.float64, "bool": torch.bool}.get(str(array.dtype), torch.float32)
