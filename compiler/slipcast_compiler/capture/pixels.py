"""Arrays of numpy that remember which tensor they are: what a pipeline makes of a picture's numbers, until it makes a
tensor of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._device import _device_constructors

from slipcast_compiler.capture.where import here

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
_OF_SHAPES = (np.shape, np.ndim, np.size, np.zeros_like, np.ones_like, np.empty_like)
_READS = (
    "tolist", "item", "tobytes", "tofile", "dump", "dumps", "nonzero", "argmax", "argmin", "argsort", "searchsorted",
    "fill", "put", "sort", "partition", "itemset", "__iter__", "__float__", "__int__", "__bool__", "__contains__",
)  # fmt: skip
_TYPES = {np.dtype(name): getattr(torch, name) for name in ("float32", "float64", "uint8", "bool")}


@dataclass
class Reading:
    """Of a picture, into an array, and where. `taken`: a tensor was made of it; `escaped`: where something else was."""

    place: str
    taken: bool = False
    escaped: str = ""


class Pixels(np.ndarray[Any, np.dtype[Any]]):
    """`tensor`: of the same shape and numbers; None where there is none. `readings`: that it comes from. `memory`: how
    often what its views share was written to, and `version`: how often when this was its tensor."""

    tensor: torch.Tensor | None = None
    readings: tuple[Reading, ...] = ()
    memory: list[int]
    version: int = 0

    def __array_finalize__(self, other: Any) -> None:
        _escape([other])  # in a way that none of what is below knows

    @property
    def known(self) -> torch.Tensor | None:
        """Its tensor, if nothing was written to its memory since by another view."""
        return self.tensor if self.tensor is not None and self.memory[0] == self.version else None

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        made = getattr(ufunc, method)(*_plain(inputs), **_plain(kwargs))
        into = kwargs.pop("out", None)
        if method != "__call__" or kwargs or ufunc not in _UFUNCS or not _is_exact(made) or not _all_known(inputs):
            return _escaping(made, inputs)

        def tensor() -> torch.Tensor:
            found: torch.Tensor = _UFUNCS[ufunc](*map(_tensor, _in_one_type(inputs, made)))
            return found

        if into is None:
            return _remembering(made, tensor, inputs)
        (target,) = into
        if not isinstance(target, Pixels):
            return _escaping(target, inputs)
        target.write(tensor())
        return target

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        made = func(*_plain(args), **_plain(kwargs))
        given = args[0] if args and isinstance(args[0], list | tuple) else args[:1]
        axis = kwargs.get("axis", args[1] if len(args) > 1 else 0)
        if func in _OF_SHAPES:
            return made
        plain = set(kwargs) <= {"axis"} and isinstance(axis, int) and len(args) <= 2 and _all_known(given)
        if plain and func in (np.stack, np.concatenate):
            join, kind = torch.stack if func is np.stack else torch.cat, _TYPES[made.dtype]
            return _remembering(made, lambda: join([_tensor(each).to(kind) for each in given], axis), given)
        if plain and func is np.expand_dims:
            return _remembering(made, lambda: _tensor(args[0]).unsqueeze(axis), given, view=True)
        if func is np.transpose and set(kwargs) <= {"axes"}:
            axes = kwargs.get("axes", args[1] if len(args) > 1 else None)
            return args[0].transpose(axes)
        return _escaping(made, [self, *given])

    def __getitem__(self, key: Any) -> Any:
        made = self.view_plain()[_plain(key)]
        keys = key if isinstance(key, tuple) else (key,)
        if not all(each is None or each is Ellipsis or type(each) is int or _is_forward(each) for each in keys):
            return _escaping(made, [self])
        return _remembering(made, lambda: _tensor(self)[key], [self], view=True)

    def __setitem__(self, key: Any, value: Any) -> None:
        mask, known = key.known if isinstance(key, Pixels) else None, self.known
        self.view_plain()[_plain(key)] = _plain(value)
        if mask is None or known is None or not np.isscalar(value) or mask.ndim > self.ndim or self.dtype not in _TYPES:
            _escape([self, key, value])
            self.write(None)
            return
        mask = mask.reshape(*mask.shape, *[1] * (self.ndim - mask.ndim))
        self.write(torch.where(mask, float(self.dtype.type(value)), known))
        self.readings += key.readings

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        made = self.view_plain().astype(dtype, *args, **kwargs)
        if made.dtype not in _TYPES or not (_is_exact(made) or made.dtype == self.dtype):
            return _escaping(made, [self])
        return _remembering(made, lambda: _tensor(self).to(_TYPES[made.dtype], copy=True), [self])

    def transpose(self, *axes: Any) -> Any:
        made = self.view_plain().transpose(*axes)
        order = (axes[0] if len(axes) == 1 else axes) or tuple(reversed(range(self.ndim)))
        return _remembering(made, lambda: _tensor(self).permute(tuple(order)), [self], view=True)

    def reshape(self, *shape: Any, **kwargs: Any) -> Any:
        made = self.view_plain().reshape(*shape, **kwargs)
        if kwargs:
            return _escaping(made, [self])
        return _remembering(made, lambda: _tensor(self).reshape(made.shape), [self], view=True)

    def copy(self, order: Any = "C") -> Any:
        return _remembering(self.view_plain().copy(order), lambda: _tensor(self).clone(), [self])

    def view_plain(self) -> Any:
        """The same memory, without its own memory."""
        return self.view(np.ndarray)

    def write(self, tensor: torch.Tensor | None) -> None:
        """What is in its memory now."""
        self.memory[0] += 1
        self.tensor, self.version = tensor, self.memory[0]


def _reading(name: str) -> Callable[..., Any]:
    def read(self: Pixels, *args: Any, **kwargs: Any) -> Any:
        _escape([self])
        return getattr(self.view_plain(), name)(*_plain(args), **_plain(kwargs))

    return read


for _name in _READS:
    if hasattr(np.ndarray, _name):
        setattr(Pixels, _name, _reading(_name))


def remember(array: Any, tensor: torch.Tensor, *readings: Reading) -> Pixels:
    """The array, which from here on is this tensor."""
    found: Pixels = np.asarray(array).view(Pixels)
    found.tensor, found.readings, found.memory = tensor, readings, [0]
    return found


@contextlib.contextmanager
def tensors_of_pixels() -> Iterator[None]:
    """Within it, what torch makes of an array is the tensor that it remembers."""
    usual = torch.from_numpy, torch.tensor, torch.as_tensor

    def through(function: Callable[..., Any]) -> Callable[..., Any]:
        def made(value: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(value, Pixels):
                return function(value, *args, **kwargs)
            if (known := value.known) is None or value.dtype not in _TYPES or args or set(kwargs) - {"dtype", "device"}:
                _escape([value])
                return function(value.view_plain(), *args, **kwargs)
            for reading in value.readings:
                reading.taken = True
            return known.to(kwargs.get("dtype") or _TYPES[value.dtype], copy=True)

        return made

    torch.from_numpy, torch.tensor, torch.as_tensor = map(through, usual)
    try:
        yield
    finally:
        torch.from_numpy, torch.tensor, torch.as_tensor = usual
        _device_constructors.cache_clear()  # see inside.py


def _remembering(made: Any, tensor: Callable[[], torch.Tensor], given: Sequence[Any], view: bool = False) -> Any:
    """What numpy made of arrays, with what torch makes of their tensors. `view`: of the memory of the first."""
    if not isinstance(made, np.ndarray) or not _all_known(given):
        return _escaping(made, given)
    pixels = [each for each in given if isinstance(each, Pixels)]
    found = remember(made, tensor(), *(reading for each in pixels for reading in each.readings))
    if view:
        found.memory, found.version = pixels[0].memory, pixels[0].version
    return found


def _escaping(made: Any, given: Any) -> Any:
    _escape(given)
    return _plain(made)


def _escape(given: Any) -> None:
    """The numbers of these arrays go where they are not followed."""
    for each in given:
        if isinstance(each, Pixels) and each.tensor is not None:
            for reading in each.readings:
                reading.escaped = reading.escaped or here()


def _all_known(given: Any) -> bool:
    return all(each.known is not None for each in given if isinstance(each, Pixels))


def _is_forward(key: Any) -> bool:
    return isinstance(key, slice) and (key.step is None or key.step > 0)


def _in_one_type(inputs: Sequence[Any], made: Any) -> list[Any]:
    """As numpy computes: in the type of the result; of a comparison, in that of what is compared."""
    kinds = [_TYPES[each.dtype] for each in inputs if isinstance(each, np.ndarray)]
    kind = _TYPES[made.dtype] if made.dtype != bool else max(kinds, key=lambda each: each.itemsize)
    return [_tensor(each).to(kind) if isinstance(each, np.ndarray) else each for each in inputs]


def _tensor(value: Any) -> Any:
    if isinstance(value, Pixels) and (known := value.known) is not None:
        return known
    return torch.from_numpy(np.ascontiguousarray(_plain(value))) if isinstance(value, np.ndarray) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_plain(each) for each in value)
    return value.view_plain() if isinstance(value, Pixels) else value


def _is_exact(made: Any) -> bool:
    """Whether torch, which knows the numbers as floats, computes the same."""
    return isinstance(made, np.ndarray) and made.dtype in (np.float32, np.float64, np.bool_)
