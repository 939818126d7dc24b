"""Which of the tensors that a module is given have numbers that decide what it does."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class Deciding:
    """Follows the numbers of tensors through operators. `found`: the places, among the tensors `given`, of those whose
    numbers were read, by Python or for the size of a result. Where one is written into a part of another's memory,
    all of that counts as coming from both."""

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        self.found = set[int]()
        # storage, whose address may be another's once it is gone -> the places that its numbers came from
        self._origins: dict[int, tuple[weakref.ref[Any], frozenset[int]]] = {}
        for place, tensor in enumerate(given):
            self._note(tensor, self._of([tensor]) | {place})

    def read(self, *tensors: torch.Tensor) -> None:
        """Their numbers decide."""
        self.found |= self._of(tensors)

    def compute(self, func: Any, given: Any, made: Any) -> None:
        """What an operator made of what it was given."""
        tensors = _tensors(given)
        if origins := self._of(tensors):
            for tensor in (*_tensors(made), *(tensors if func._schema.is_mutable else ())):
                self._note(tensor, origins)

    def _note(self, tensor: torch.Tensor, origins: frozenset[int]) -> None:
        storage = tensor.untyped_storage()
        self._origins[storage._cdata] = weakref.ref(storage), origins

    def _of(self, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
        found = [self._origins.get(each.untyped_storage()._cdata) for each in tensors]
        return frozenset().union(*(origins for alive, origins in filter(None, found) if alive() is not None))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
