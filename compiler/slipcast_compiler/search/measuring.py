"""What a trial's engines do, through the runtime, in a process that keeps them open; imports no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import MANIFEST_NAME, Caching, Sampling, read_manifest
from slipcast.bundle.reader import Bundle
from slipcast.engines import Engine, EngineWrapper, Instrument
from slipcast.run.pipeline import Pipeline
from slipcast_compiler.export.parts import write_step_table

Floats = npt.NDArray[np.float32]
Prompts = tuple[str | None, ...]

PAIRS = 5  # images of a trial and of the baseline, in turn
PAUSE_S = 0.02  # between two runs: thread pools spin for a while after their work


@dataclass(frozen=True)
class Variant:
    """Engines and a way to sample with them. `folder`: a bundle with its first target. `step`: where the denoiser's
    step graph is, with which a table is made for the schedule; None where it was not cut. `caching`: with a shallow
    denoiser, the steps that it is for."""

    folder: Path
    sampling: Sampling
    step: Path | None
    caching: Caching | None = None


@dataclass(frozen=True)
class Job:
    """`latents`: a file with the original's at the end, float32 [n, c, h, w], of `prompts` and `seeds`."""

    baseline: Variant
    prompts: Prompts
    seeds: tuple[int, ...]
    latents: Path


class Measuring:
    """Two sets of engines are open: the baseline's, and those of the last variant."""

    def __init__(self, job: Job) -> None:
        self._job, self._open = job, dict[Path, _Engines]()
        self._latents: Floats = np.load(job.latents)
        self._baseline = self._pipeline(job.baseline)

    def measure(self, variant: Variant) -> dict[str, float]:
        """distance: RMS over the cells of each image, mean over images, to the original's latents. ratio: median of
        seconds of one image / the baseline's, pair by pair, and so free of what the machine does besides; seconds: the
        median itself."""
        job, pipe = self._job, self._pipeline(variant)
        found = _run(pipe, job.prompts, job.seeds, "latent")
        squares = ((found - self._latents) ** 2).reshape(len(found), -1).mean(1)
        pairs = [self._pair(pipe, turn) for turn in range(-1, PAIRS)][1:]  # the first is warm-up
        return {
            "distance": float(np.sqrt(squares).mean()), "ratio": statistics.median(own / base for own, base in pairs),
            "seconds": statistics.median(own for own, _ in pairs),
        }  # fmt: skip

    def draw(self, variant: Variant, prompts: Prompts, seeds: tuple[int, ...]) -> Floats:
        """float32 [n, h, w, 3] in [0, 1]."""
        return _run(self._pipeline(variant), prompts, seeds, "np")

    def _pair(self, pipe: Pipeline, turn: int) -> tuple[float, float]:
        """Seconds of one image by `pipe` and by the baseline, who take turns in being first."""
        image, seconds = turn % len(self._job.prompts), dict[Pipeline, float]()
        for each in (pipe, self._baseline)[:: 1 if turn % 2 else -1]:
            time.sleep(PAUSE_S)
            begin = time.perf_counter()
            _run(each, self._job.prompts[image : image + 1], self._job.seeds[image : image + 1], "np")
            seconds[each] = time.perf_counter() - begin
        return seconds[pipe], seconds[self._baseline]

    def _pipeline(self, variant: Variant) -> Pipeline:
        """A pipeline on the engines of the variant's folder, with its sampling in place of the manifest's."""
        # Ours, and just made; only its step table is written again and again.
        manifest = read_manifest((variant.folder / MANIFEST_NAME).read_bytes())
        others = [name for name in manifest.requires if not name.startswith("guidance")]
        fields: dict[str, Any] = {
            "sampling": variant.sampling, "requires": (*others, *variant.sampling.requires), "caching": variant.caching,
        }  # fmt: skip
        if variant.step:
            fields["cut"] = write_step_table(variant.step, variant.sampling, variant.folder)
        bundle = Bundle(variant.folder, manifest.model_copy(update=fields))
        return Pipeline(bundle, manifest.targets[0], instrument=self._engines(variant.folder).lend())

    def _engines(self, folder: Path) -> _Engines:
        if folder not in self._open:
            for other in [path for path in self._open if path != self._job.baseline.folder]:
                self._open.pop(other).close()
            self._open[folder] = _Engines()
        return self._open[folder]


class _Engines:
    """Engines that are opened once and lent to one pipeline after the other."""

    def __init__(self) -> None:
        self._open: dict[str, Engine] = {}
        self._to_close = ExitStack()

    def lend(self) -> Instrument:
        """Of one pipeline: what is open already, in place of opening it."""
        lent = set[str]()

        def instrument(component: str, open: Callable[..., Engine]) -> Engine:
            if component in lent:  # a second one: a decoder of higher precision, where the first overflowed
                return open()
            lent.add(component)
            if component not in self._open:
                self._open[component] = self._to_close.enter_context(open())
            return _Lent(self._open[component])

        return instrument

    def close(self) -> None:
        """Free them."""
        self._open.clear()
        self._to_close.close()


class _Lent(EngineWrapper):
    """An engine that stays open when whoever uses it has done."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


def _run(pipe: Pipeline, prompts: Prompts, seeds: tuple[int, ...], output: str) -> Floats:
    """All images, in as few calls as the target allows."""
    built = pipe.manifest.targets[0].built
    size, made = built.max_images if built else len(seeds), list[Floats]()
    for part in (slice(i, i + size) for i in range(0, len(seeds), size)):
        given: dict[str, Any] = {"prompt": list(prompts[part])}
        if not pipe.manifest.takes_prompt:
            given = {"num_images_per_prompt": len(seeds[part])}
        made.append(pipe(**given, seed=list(seeds[part]), output_type=cast(Any, output)).images)
    return np.concatenate(made)
