"""How much memory a module's values take while it runs, told from shapes alone."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from slipcast_compiler.graph.slices import FLOAT_BYTES, scores_bytes


class LiveBytes:
    """Of tensors on meta that are noted: `peaks`, the most bytes that were alive at once, by the module that ran."""

    def __init__(self) -> None:
        self.peaks, self._module, self._now = dict[str, int](), "", 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def peak(self) -> int:
        """Of all."""
        return max(self.peaks.values(), default=0)

    def begin(self, module: str) -> None:
        """What is noted from here on is of this module."""
        self._module = module

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
                self.peaks[self._module] = max(self.peaks.get(self._module, 0), self._now)

    def _end(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self._now -= size


def fused_attention(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What attention on meta gives, as one operator: there it would be spelled out, with a matrix of scores that takes
    more memory than all else, and that no engine for CPUs has at once (graph/slices.py). None for other operators."""
    if func is not torch.ops.aten.scaled_dot_product_attention.default or kwargs.get("dropout_p"):
        return None
    query, key, value = args[:3]
    if not query.is_meta:
        return None
    causal = bool(kwargs.get("is_causal") or args[5:6] == (True,))
    sizes = [int(size) for size in query.shape]
    held = query.new_empty(scores_bytes(sizes, int(key.shape[-2]), causal) // FLOAT_BYTES)
    result = query.new_empty((*query.shape[:-1], value.shape[-1]))
    del held  # noted beside the result
    return result
