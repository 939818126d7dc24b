"""Record what a bundle's components read and give while it draws; imports nothing that the runtime does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from slipcast.bundle.manifest import Target
from slipcast.bundle.reader import Bundle, open_bundle
from slipcast.engines import Array, Engine
from slipcast.progress import Advance
from slipcast.run.guard import FALLBACK
from slipcast.run.pipeline import Floats, Indices, OnStepEnd, Pipeline
from slipcast.run.request import Request


def record(
    root: Path,
    target: str,
    components: Collection[str],
    prompts: Sequence[str | None],
    count: int,
    out: Path,
    advance: Advance,
) -> None:
    """Draw image i from prompt i with seed i, and write `count` evaluations of each of the components, or all where
    there are fewer, to out/COMPONENT/0000.npz and so on.

    Every image gives about as many, spread over its steps and beginning at another one than the last image's. What is
    in memory is one image's.
    """
    bundle, written = open_bundle(root), Counter[str]()
    chosen = next(each for each in bundle.manifest.targets if each.id == target)
    with Recording(bundle, chosen, components) as pipe:
        guard: Any = "fallback" if FALLBACK in components else "warn"
        for i, prompt in enumerate(prompts):
            advance(i, len(prompts))
            pipe.forget()
            pipe(prompt, seed=i, output_type="np" if "vae_decoder" in components else "latent", guard=guard)
            for component, evaluations in pipe.recorded.items():
                (out / component).mkdir(exist_ok=True)
                share = min(count * (i + 1) // len(prompts) - written[component], len(evaluations))
                for k in range(share):
                    place = int((k + (i + 0.5) / len(prompts)) * len(evaluations) / share)
                    file = out / component / f"{written[component] + k:04}.npz"
                    np.savez(file, **cast(Any, evaluations[place]))
                written[component] += share


class Recording(Pipeline):
    """A pipeline that remembers what its engines read and gave, in `recorded`, by component and evaluation.

    None of `components` is spared: what is tabled by timestep is computed, and what draws strangers draws everyone.
    """

    def __init__(self, bundle: Bundle, target: Target, components: Collection[str]) -> None:
        """See Pipeline; every engine stays open."""
        self.recorded: dict[str, list[dict[str, Array]]] = {name: [] for name in components}
        super().__init__(bundle, target)
        if "denoiser_step" in components:
            self._step_table = {}

    def forget(self) -> None:
        """Begin anew."""
        for evaluations in self.recorded.values():
            evaluations.clear()

    def _open(self, component: str, precision: str | None = None, target: Target | None = None) -> Engine:
        engine = super()._open(component, precision, target)
        return _Recorder(engine, self.recorded[component]) if component in self.recorded else engine

    def _denoise(
        self, request: Request, conditioning: dict[str, Floats], callback: OnStepEnd | None, seconds: dict[str, float]
    ) -> tuple[Floats, Indices]:
        if request.fallback and FALLBACK in self.recorded:
            super()._denoise(request.fallback, conditioning, callback, seconds)
        return super()._denoise(request, conditioning, callback, seconds)

    def _denoise_apart(
        self, request: Request, strangers: list[int], conditioning: dict[str, Floats], *rest: Any
    ) -> tuple[Floats, Indices]:
        return self._denoise(request, conditioning, *rest)


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
