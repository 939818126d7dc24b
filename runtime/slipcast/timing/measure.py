"""Run a bundle with a clock around every call of an engine; without, then with the engines' own profilers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from slipcast.bundle.evidence import held_out_prompts, report_files
from slipcast.bundle.manifest import Target
from slipcast.bundle.reader import open_bundle
from slipcast.engines import Array, Engine, LayerTime, ProfiledEngine, open_engine
from slipcast.progress import Stages
from slipcast.run.pipeline import Pipeline, load
from slipcast.run.residency import Residency
from slipcast.timing.document import make_document
from slipcast.timing.memory import available_mb, measure_memory, status_mb

MOST_RUNS, ENOUGH_S = 5, 10.0  # what is quick is run several times


@dataclass(frozen=True)
class Run:
    """One run on the clock; seconds since it began. `calls`: component, begin, end; `steps`: timestep, end."""

    total: float
    calls: list[tuple[str, float, float]]
    steps: list[tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """`plain` and `profiled` runs after a `first_s` that warmed up, one after the other where `in_turn`; `layers` are
    of all profiled runs together."""

    first_s: float
    plain: list[Run]
    profiled: list[Run]
    in_turn: bool
    layers: dict[str, tuple[LayerTime, ...]]
    before_mb: float | None
    peak_mb: float | None
    memory: dict[str, dict[str, float] | None] = field(default_factory=dict)


class Recorder(Residency):
    """Takes the place of a pipeline's residency: keeps every engine open and the time of every call."""

    def __init__(self, openers: Mapping[str, Callable[[], Engine]]) -> None:
        super().__init__(openers, "all")
        self.calls: list[tuple[str, float, float]] = []
        self.inputs: dict[str, Mapping[str, Array]] = {}

    @contextmanager
    def use(self, component: str) -> Iterator[Engine]:
        """The component's engine, with a clock around it."""
        with super().use(component) as engine:
            yield cast(Engine, partial(self._call, component, engine))

    def engine(self, component: str) -> ProfiledEngine:
        """The engine itself, of a recorder that opened profiled ones."""
        return cast(ProfiledEngine, self._open[component])

    def _call(self, component: str, engine: Engine, arrays: Mapping[str, Array]) -> dict[str, Array]:
        self.inputs.setdefault(component, arrays)
        begin = time.perf_counter()
        outputs = engine(arrays)
        self.calls.append((component, begin, time.perf_counter()))
        return outputs


def profile_run(
    path: Path, prompt: str | None, target: str, steps: int | None, num_images: int, seed: int, allow_unlisted: bool,
    stages: Stages,
) -> dict[str, Any]:  # fmt: skip
    """Run a bundle and say where its time and memory go; see document.py for the result.

    `prompt`: None is the first held-out prompt of the bundle's report. Raises what loading and running raise, and
    HostError where the target's engine has no profiler.
    """
    if prompt is None:
        prompt = _report_prompt(path, allow_unlisted)
    with stages.stage("load"):
        pipe = load(path, target=target, residency="sequential", allow_unlisted=allow_unlisted)
    chosen = next(each for each in pipe.manifest.targets if each.id == pipe.target)
    request = {"prompt": prompt, "seed": seed, "num_images_per_prompt": num_images, "num_inference_steps": steps}
    measured = _measure(pipe, chosen, request, stages)
    return make_document(pipe.manifest, chosen, request, measured)


def _report_prompt(path: Path, allow_unlisted: bool) -> str | None:
    """None for a bundle that takes no text."""
    bundle = open_bundle(path, allow_unlisted=allow_unlisted, files=report_files)
    return next(iter(held_out_prompts(bundle)), None)


def _measure(pipe: Pipeline, target: Target, request: dict[str, Any], stages: Stages) -> Measured:
    before_mb = status_mb("VmRSS")
    with ExitStack() as stack:
        with stages.stage(f"first run on {pipe.target}"):
            plain = stack.enter_context(closing(Recorder(_openers(pipe, target, profile=False))))
            first = _run(pipe, plain, request)
        peak_mb, count = status_mb("VmHWM"), max(1, min(MOST_RUNS, int(ENOUGH_S / first.total)))
        # In turn, so that a change of the machine's load does not pass for the profiler's cost.
        in_turn = _fits_twice(before_mb, peak_mb)
        with stages.stage(f"{count} runs without and with the profiler") as advance:
            runs = [] if in_turn else [_run(pipe, plain, request) for _ in range(count)]
            if not in_turn:
                plain.close()
            recorder = stack.enter_context(closing(Recorder(_openers(pipe, target, profile=True))))
            for component, arrays in plain.inputs.items():
                recorder.engine(component)(arrays)
                recorder.engine(component).start_profile()
            profiled = []
            for done in range(count):
                advance(done, count)
                if in_turn:
                    runs.append(_run(pipe, plain, request))
                profiled.append(_run(pipe, recorder, request))
            layers = {component: recorder.engine(component).layers() for component in plain.inputs}
    measured = Measured(first.total, runs, profiled, in_turn, layers, before_mb, peak_mb)
    with stages.stage("memory") as advance:
        for done, (component, arrays) in enumerate(plain.inputs.items()):
            advance(done, len(plain.inputs))
            measured.memory[component] = measure_memory(pipe.bundle, target, component, arrays)
    return measured


def _fits_twice(before_mb: float | None, peak_mb: float | None) -> bool:
    """Whether there is room for the engines once more."""
    available = available_mb()
    if before_mb is None or peak_mb is None or available is None:
        return False
    return available > 1.5 * (peak_mb - before_mb)


def _openers(pipe: Pipeline, target: Target, profile: bool) -> dict[str, Callable[[], Engine]]:
    path, contracts = pipe.bundle.path, pipe.manifest.components
    return {
        name: partial(
            open_engine, target.engine, path(files.model), path(files.weights) if files.weights else None,
            target.precision, contracts[name], profile,
        )
        for name, files in target.components.items()
    }  # fmt: skip


def _run(pipe: Pipeline, recorder: Recorder, request: dict[str, Any]) -> Run:
    pipe.residency, recorder.calls = recorder, []
    steps: list[tuple[float, float]] = []
    begin = time.perf_counter()
    pipe(**request, callback_on_step_end=lambda _, __, t, ___: steps.append((t, time.perf_counter() - begin)))
    total = time.perf_counter() - begin
    return Run(total, [(name, start - begin, end - begin) for name, start, end in recorder.calls], steps)
