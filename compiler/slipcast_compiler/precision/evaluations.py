"""What a component read and gave while pictures were drawn, and how far another one is off on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.errors import NumericalError, ResourceError
from slipcast.sampling.guidance import guide
from slipcast_compiler.precision.sensitivity import JUDGED

WORST = 1e3  # the error where all should be zero

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Evaluations:
    """Evaluations in `folder`, 0000.npz and so on, arrays by name: `outputs` are what a component gave in fp32, all
    others what it read.

    `guidance`: what its outputs are guided by, where their rows are two branches, the unconditional ones first; else 1.
    `samples`: how many of them to quantise on, where not on all.
    """

    folder: Path
    outputs: tuple[str, ...] = ("prediction",)
    guidance: float = 1.0
    samples: int | None = None

    def _files(self, count: int | None) -> list[Path]:
        """So many of them, from first to last."""
        files = sorted(self.folder.glob("*.npz"))
        if not files:
            raise ResourceError(f"{self.folder}: no evaluation was recorded", hint="remove the cache's entry")
        places = np.linspace(0, len(files) - 1, min(count or len(files), len(files))).round().astype(int)
        return [files[place] for place in places]

    def inputs(self) -> Iterator[Arrays]:
        """What it read, one evaluation at a time."""
        for file in self._files(self.samples):
            with np.load(file) as arrays:
                yield {name: arrays[name] for name in arrays if name not in self.outputs}

    def error(self, run: Callable[[Mapping[str, Any]], Mapping[str, Any]], count: int = JUDGED) -> float:
        """How far the guided outputs of `run` are off, |difference| / |output| over `count` evaluations, of the output
        that is furthest off: one may be a mask with numbers that dwarf all others.

        Raises NumericalError where they are not finite, and should be.
        """
        difference, norm = dict.fromkeys(self.outputs, 0.0), dict.fromkeys(self.outputs, 0.0)
        for file in self._files(count):
            with np.load(file) as arrays:
                inputs = dict(arrays)
            wanted = {name: self._guided(inputs.pop(name)) for name in self.outputs}
            given = run(inputs)
            for name in self.outputs:
                found = self._guided(given[name])
                with np.errstate(invalid="ignore"):  # a mask may have infinity
                    apart = np.where(found == wanted[name], 0, found - wanted[name])
                difference[name] += float(np.square(apart).sum())
                norm[name] += float(np.square(wanted[name][np.isfinite(wanted[name])]).sum())
        if not np.isfinite([*difference.values()]).all():
            raise NumericalError(
                f"what the quantised {self.folder.name} gives is not finite", expected="finite numbers", got=difference
            )
        return max(float(np.sqrt(difference[name] / norm[name])) if norm[name] else WORST * (difference[name] > 0)
                   for name in self.outputs)  # fmt: skip

    def _guided(self, output: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        whole = output.astype(np.float64)
        if self.guidance <= 1.0:
            return whole
        unconditional, conditional = np.split(whole, 2)
        guided: npt.NDArray[np.float64] = guide(conditional, unconditional, self.guidance)
        return guided
