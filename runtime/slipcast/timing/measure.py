"""Run a bundle with a clock around every call of an engine; without, then with the engines' own profilers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slipcast.bundle.evidence import held_out_prompts, report_files
from slipcast.bundle.manifest import Target
from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.progress import Stages
from slipcast.run.load import load
from slipcast.run.pipeline import Pipeline
from slipcast.run.program import ProgramPipeline
from slipcast.timing.clock import Clock
from slipcast.timing.component import measure_component
from slipcast.timing.document import Measured, make_document
from slipcast.timing.memory import available_mb, peak_mb, resident_mb

MOST_RUNS, ENOUGH_S = 5, 10.0  # what is quick is run several times


def profile_run(
    path: Path,
    prompt: str | None,
    target: str,
    steps: int | None,
    num_images: int,
    seed: int,
    allow_unlisted: bool,
    stages: Stages,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The document (see make_document) that says where a bundle's run spends its time and memory.

    `prompt`: None is the first held-out prompt of the bundle's report. `given`: what a captured program takes besides,
    such as pictures. Raises what loading and running raise, and
    HostError where the target's engine has no profiler.
    """
    if prompt is None:
        prompt = _report_prompt(path, allow_unlisted)
    clock, before_mb = Clock(), resident_mb()
    with stages.stage("load"):
        pipe = load(path, target=target, instrument=clock, allow_unlisted=allow_unlisted)
    asked = {"prompt": prompt, "seed": seed, "num_images_per_prompt": num_images, "num_inference_steps": steps}
    request = asked | dict(given)
    chosen = next(each for each in pipe.manifest.targets if each.id == pipe.target)
    with pipe:
        measured = _measure(pipe, chosen, clock, before_mb, request, stages)
    return make_document(pipe.manifest, chosen, request, measured)


def _report_prompt(path: Path, allow_unlisted: bool) -> str | None:
    """None for a bundle that takes no text."""
    bundle = open_any_bundle(path, allow_unlisted=allow_unlisted, files=report_files)
    return next(iter(held_out_prompts(bundle)), None)


def _again(pipe: Pipeline | ProgramPipeline, target: Target, profiler: Clock) -> Pipeline | ProgramPipeline:
    """The same bundle once more, with the profiler on."""
    if isinstance(pipe.bundle, ProgramBundle):
        return ProgramPipeline(pipe.bundle, target, instrument=profiler)
    return Pipeline(pipe.bundle, target, instrument=profiler)


def _measure(
    pipe: Pipeline | ProgramPipeline,
    target: Target,
    clock: Clock,
    before_mb: float,
    request: dict[str, Any],
    stages: Stages,
) -> Measured:
    """`clock`: the pipeline's instrument. `before_mb`: resident before it was loaded. Closes the pipeline."""
    with stages.stage(f"first run on {pipe.target}"):
        first = clock.run(pipe, request)
    most_mb, count = peak_mb(), max(1, min(MOST_RUNS, int(ENOUGH_S / first.total)))
    # In turn, so that a change of the machine's load does not pass for the profiler's cost.
    in_turn = available_mb() > 1.5 * (most_mb - before_mb)  # room for the engines once more
    profiler = Clock(profile=True)
    with ExitStack() as stack, stages.stage(f"{count} runs without and with the profiler") as advance:
        plain = [] if in_turn else [clock.run(pipe, request) for _ in range(count)]
        if not in_turn:
            pipe.close()
        stack.enter_context(profiling := _again(pipe, target, profiler))
        for component, arrays in clock.inputs.items():
            with profiling.residency.use(component) as engine:
                engine(arrays)
            profiler.profiled(component).start_profile()
        profiled = []
        for done in range(count):
            advance(done, count)
            if in_turn:
                plain.append(clock.run(pipe, request))
            profiled.append(profiler.run(profiling, request))
        layers = {component: profiler.profiled(component).layers() for component in clock.inputs}
    pipe.close()
    memory = dict[str, dict[str, float] | None]()
    with stages.stage("memory") as advance:
        for done, (component, arrays) in enumerate(clock.inputs.items()):
            advance(done, len(clock.inputs))
            memory[component] = measure_component(pipe.bundle, target, component, arrays)
    return Measured(first.total, plain, profiled, in_turn, layers, before_mb, most_mb, memory)
