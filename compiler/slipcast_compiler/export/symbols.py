"""While a graph is traced, a size that is free is a symbol, and int(size) would make it the number that it has then."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


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
    """Within it, int(size) is the size in the code of a module and of its parts."""
    files = [vars(sys.modules[name]) for name in {type(each).__module__ for each in module.modules()}]
    own = [each for each in files if "int" not in each]
    for each in own:
        each["int"] = _Int
    try:
        yield
    finally:
        for each in own:
            del each["int"]
