"""Record what a bundle's denoiser reads and gives while it draws; imports nothing that the runtime does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from slipcast.bundle import Bundle, open_bundle
from slipcast.engines import Array, Engine
from slipcast.manifest import Target
from slipcast.pipeline import Pipeline
from slipcast.progress import Advance


def record_denoiser(root: Path, prompts: Sequence[str | None], count: int, out: Path, advance: Advance) -> None:
    """Draw image i from prompt i with seed i, and write `count` evaluations of the denoiser to out/0000.npz and so on.

    Every image gives about as many, spread over its steps and beginning at another one than the last image's. What is
    in memory is one image's.
    """
    bundle = open_bundle(root)
    written = 0
    with Recording(bundle, bundle.manifest.targets[0]) as pipe:
        for i, prompt in enumerate(prompts):
            advance(i, len(prompts))
            pipe.recorded.clear()
            pipe(prompt, seed=i, output_type="latent", guard="warn")
            share = count * (i + 1) // len(prompts) - written
            for k in range(share):
                place = int((k + (i + 0.5) / len(prompts)) * len(pipe.recorded) / share)
                np.savez(out / f"{written + k:04}.npz", **cast(Any, pipe.recorded[place]))
            written += share


class Recording(Pipeline):
    """A pipeline that remembers what its denoiser read and gave, in `recorded`, by evaluation."""

    def __init__(self, bundle: Bundle, target: Target) -> None:
        """See Pipeline; every engine stays open."""
        self.recorded: list[dict[str, Array]] = []
        super().__init__(bundle, target)

    def _open(self, component: str, precision: str | None = None, target: Target | None = None) -> Engine:
        engine = super()._open(component, precision, target)
        return _Recorder(engine, self.recorded) if component == "denoiser" else engine


class _Recorder:
    """An engine that keeps copies of its arrays."""

    def __init__(self, engine: Engine, recorded: list[dict[str, Array]]) -> None:
        self._engine, self._recorded = engine, recorded
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._engine(arrays)
        self._recorded.append({name: array.copy() for name, array in {**arrays, **outputs}.items()})
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._engine.__exit__(kind, error, at)
