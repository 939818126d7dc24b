"""Statistics of fixed size, whatever is added to them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from slipcast_compiler.model.layers import LinearLayer

Floats = npt.NDArray[np.float32]

CAPACITY = 256  # samples kept for percentiles: the 90th is then within 2 % (one sigma) of its rank


class Reservoir:
    """A uniform sample of all rows added so far (Vitter's Algorithm R, 1985); float32 [capacity, width]."""

    def __init__(self, width: int, capacity: int = CAPACITY) -> None:
        self.seen = 0
        self._rows = np.empty((capacity, width), np.float32)
        self._random = np.random.default_rng(0)  # the same choice in every layer, and in every run

    def add(self, rows: Floats) -> None:
        """float32 [n, width]."""
        for row in rows:
            place = self.seen if self.seen < len(self._rows) else int(self._random.integers(self.seen + 1))
            if place < len(self._rows):
                self._rows[place] = row
            self.seen += 1

    def percentile(self, percent: float) -> Floats:
        """float32 [width]."""
        return np.percentile(self._rows[: self.seen], percent, axis=0).astype(np.float32)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes


class Inputs:
    """Second moments and ranges of linear layers' inputs. Layers that are given the very same tensor share them."""

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}  # linear layer -> the layer under whose name its input is measured
        self._sums: dict[str, torch.Tensor] = {}
        self._ranges: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._current: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}  # of this evaluation, by id

    def add(self, layer: LinearLayer, x: torch.Tensor) -> None:
        """x: [rows, ..., inputs], or [rows, inputs, h, w] of a convolution."""
        name = layer.name
        if name not in self.leader:
            known = self._current.get(id(x))
            self.leader[name] = known[1] if known and known[0]() is x else name
            self._current[id(x)] = weakref.ref(x), self.leader[name]
        if self.leader[name] != name:
            return
        tokens = (x.movedim(1, -1) if layer.convolution else x).reshape(-1, layer.inputs)
        low_high = torch.stack([tokens.amin(0), tokens.amax(0)])
        if name in self._sums:
            self._sums[name].addmm_(tokens.T, tokens)
            before = self._ranges[name]
            torch.minimum(before[0], low_high[0], out=before[0])
            torch.maximum(before[1], low_high[1], out=before[1])
        else:
            self._sums[name], self._ranges[name], self._tokens[name] = tokens.T @ tokens, low_high, 0
        self._tokens[name] += len(tokens)

    def end_evaluation(self) -> None:
        """No tensor of the next one is one of this."""
        self._current.clear()

    def results(self) -> Iterator[tuple[str, Floats]]:
        """Tensors of the profile by name."""
        for name, total in self._sums.items():
            yield f"second_moment/{name}", (total / self._tokens[name]).numpy()
            yield f"range/{name}", self._ranges[name].numpy()

    def shared(self) -> dict[str, str]:
        """Linear layers that are measured under another's name."""
        return {name: leader for name, leader in self.leader.items() if leader != name}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._sums.values(), *self._ranges.values()))
