"""What a component read and gave while pictures were drawn, and how far another one is off on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.errors import NumericalError
from slipcast.sampling.guidance import guide
from slipcast_compiler.precision.sensitivity import JUDGED

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Evaluations:
    """Evaluations in `folder`, 0000.npz and so on, arrays by name: `outputs` are what a component gave in fp32, all
    others what it read.

    `guidance`: what its outputs are guided by, where their rows are two branches, the unconditional ones first; else 1.
    """

    folder: Path
    outputs: tuple[str, ...] = ("prediction",)
    guidance: float = 1.0

    def inputs(self) -> Iterator[Arrays]:
        """What it read, one evaluation at a time."""
        for file in sorted(self.folder.glob("*.npz")):
            with np.load(file) as arrays:
                yield {name: arrays[name] for name in arrays if name not in self.outputs}

    def error(self, run: Callable[[Mapping[str, Any]], Mapping[str, Any]], count: int = JUDGED) -> float:
        """How far the guided outputs of `run` are off, |difference| / |outputs| over `count` evaluations.

        Raises NumericalError where they are not finite.
        """
        files = sorted(self.folder.glob("*.npz"))
        places = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
        difference = norm = 0.0
        for file in (files[place] for place in places):
            with np.load(file) as arrays:
                inputs = dict(arrays)
            wanted = {name: self._guided(inputs.pop(name)) for name in self.outputs}
            given = run(inputs)
            for name in self.outputs:
                difference += float(np.square(self._guided(given[name]) - wanted[name]).sum())
                norm += float(np.square(wanted[name]).sum())
        if not np.isfinite(difference):
            raise NumericalError(
                "what a quantised component gives is not finite", expected="finite numbers", got=difference
            )
        return float(np.sqrt(difference / norm))

    def _guided(self, output: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        whole = output.astype(np.float64)
        if self.guidance <= 1.0:
            return whole
        unconditional, conditional = np.split(whole, 2)
        guided: npt.NDArray[np.float64] = guide(conditional, unconditional, self.guidance)
        return guided
