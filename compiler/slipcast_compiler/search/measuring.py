"""What a trial's engines do, through the runtime, in a process that keeps them open; imports no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from slipcast.engines import Engine, EngineWrapper, Instrument
from slipcast.run.pipeline import Pipeline
from slipcast.run.program import ProgramPipeline

Floats = npt.NDArray[np.float32]
AnyPipeline: TypeAlias = Pipeline | ProgramPipeline

PAIRS = 5  # images of a trial and of the baseline, in turn
PAUSE_S = 0.02  # between two runs: thread pools spin for a while after their work


@dataclass(frozen=True)
class Image:
    """What is drawn; `given`: arguments of the call besides."""

    prompt: str | None
    seed: int
    given: Mapping[str, Any] = field(default_factory=dict)


class Variant(Protocol):
    """Engines and a way to sample with them."""

    @property
    def folder(self) -> Path:
        """A bundle, whose first target is measured."""
        ...

    def open(self, instrument: Instrument) -> AnyPipeline:
        """A pipeline on that target."""
        ...


@dataclass(frozen=True)
class Job:
    """`originals`: a file with the original's results of these images, by place: "0" and so on."""

    baseline: Variant
    images: tuple[Image, ...]
    originals: Path


class Measuring:
    """Two sets of engines are open: the baseline's, and those of the last variant."""

    def __init__(self, job: Job) -> None:
        self._job, self._open = job, dict[Path, _Engines]()
        with np.load(job.originals) as file:
            self._originals: list[Floats] = [file[str(place)] for place in range(len(job.images))]
        self._baseline = self._pipeline(job.baseline)

    def measure(self, variant: Variant) -> dict[str, float]:
        """distance: RMS over the numbers of each image, mean over images, to the original's. ratio: median of seconds
        of one image / the baseline's, pair by pair, and so free of what the machine does besides; seconds: the median
        itself."""
        pipe = self._pipeline(variant)
        found = zip(_run(pipe, self._job.images), self._originals, strict=True)
        distances = [float(np.sqrt(np.mean((own - other.reshape(own.shape)) ** 2))) for own, other in found]
        pairs = [self._pair(pipe, turn) for turn in range(-1, PAIRS)][1:]  # the first is warm-up
        return {
            "distance": statistics.mean(distances), "ratio": statistics.median(own / base for own, base in pairs),
            "seconds": statistics.median(own for own, _ in pairs),
        }  # fmt: skip

    def draw(self, variant: Variant, images: tuple[Image, ...]) -> list[Floats]:
        """What it gives of each."""
        return _run(self._pipeline(variant), images)

    def _pair(self, pipe: AnyPipeline, turn: int) -> tuple[float, float]:
        """Seconds of one image by `pipe` and by the baseline, who take turns in being first."""
        image, seconds = self._job.images[turn % len(self._job.images)], dict[AnyPipeline, float]()
        for each in (pipe, self._baseline)[:: 1 if turn % 2 else -1]:
            time.sleep(PAUSE_S)
            begin = time.perf_counter()
            _run(each, [image])
            seconds[each] = time.perf_counter() - begin
        return seconds[pipe], seconds[self._baseline]

    def _pipeline(self, variant: Variant) -> AnyPipeline:
        return variant.open(self._engines(variant.folder).lend())

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


def _run(pipe: AnyPipeline, images: Sequence[Image]) -> list[Floats]:
    """One by one, as latency is measured."""
    drawn = (pipe(each.prompt, seed=each.seed, output_type="np", **each.given) for each in images)
    return [output.images[0] for output in drawn]
