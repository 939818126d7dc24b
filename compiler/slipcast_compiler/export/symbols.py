"""While a graph is traced, a size that is free is a symbol, and int(size) would make it the number that it has then."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Kept(type):
    """Of a class that is int but for symbols, which stay what they are."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and isinstance(args[0], torch.SymInt) else int(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)


class _Int(int, metaclass=_Kept):
    pass


@contextlib.contextmanager
def symbols_kept(module: nn.Module) -> Iterator[None]:
    """Within it, int(size) is the size in the code of a module and of its parts, and torch.as_tensor(size) has it."""
    files = [vars(sys.modules[name]) for name in {type(each).__module__ for each in module.modules()}]
    own = [each for each in files if "int" not in each]
    for each in own:
        each["int"] = _Int
    try:
        with _SizesInTensors():
            yield
    finally:
        for each in own:
            del each["int"]


class _SizesInTensors(TorchFunctionMode):  # type: ignore[misc]
    """torch.as_tensor takes of a size the number that it has in the example; torch.scalar_tensor takes the symbol."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.as_tensor and args and isinstance(args[0], torch.SymInt):
            return torch.scalar_tensor(args[0], dtype=given.get("dtype") or torch.int64, device=given.get("device"))
        return func(*args, **given)
