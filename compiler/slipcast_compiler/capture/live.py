"""How much memory a module's values take while it runs, told from shapes alone."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class LiveBytes:
    """Of tensors on meta that are noted: `peak`, the most bytes that were alive at once."""

    def __init__(self) -> None:
        self.peak, self._now = 0, 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def note(self, made: Any) -> None:
        """What an operator gave of its own."""
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive:
                self._alive[key] = weakref.ref(storage, functools.partial(self._end, key, size))
                self._now += size
                self.peak = max(self.peak, self._now)

    def _end(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self._now -= size


class FusedAttention(TorchFunctionMode):  # type: ignore[misc]
    """Within it, attention on meta gives its shape: there it would be spelled out, with a matrix of scores that takes
    more memory than all else, and that the CPU never has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            if query.is_meta and not kwargs.get("dropout_p"):
                return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **kwargs)
