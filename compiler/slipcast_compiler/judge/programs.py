"""The bundle of a captured program through the runtime, against the pipeline itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import Comparison, Metrics, Quality, Target
from slipcast.bundle.program import NUMBERS, Output, Program
from slipcast.errors import CheckFailed, NumericalError
from slipcast.progress import Stages
from slipcast.run.residency import Policy
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.captured import Floats, PipelineOriginals, VariantOriginals
from slipcast_compiler.judge.evaluate import NOBODY, Judged, not_runnable, performance
from slipcast_compiler.judge.gate import apply_gate
from slipcast_compiler.judge.judges import Judges, compare
from slipcast_compiler.judge.metrics import Reference, Samples, psnr, summarise
from slipcast_compiler.judge.originals import Run, read_run
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.recipe.recipe import GateTable


@dataclass(frozen=True)
class ProgramJudged(Judged):
    """`runs` are of the default variant; by target id, `variants`: the runs of each, and how far they are from the
    pipeline's; `outside`: those of prompts out of the family."""

    variants: Mapping[str, tuple[tuple[Run, Metrics], ...]]
    outside: Mapping[str, Run]


def judge_program(
    folder: Path, program: Program, judged_as: Sequence[tuple[Target, Policy]], originals: PipelineOriginals,
    judges: Judges, gate: GateTable, stages: Stages,
) -> ProgramJudged:  # fmt: skip
    """Draw the same with every target of the bundle in `folder`, each in a process of its own: each variant what the
    pipeline drew by its call. Of all pictures together the gate is asked, and so of every variant; time is that of the
    default one. Prompts out of the family are compared apart.

    `judged_as`: each with how its engines stay loaded. Of a video every frame is compared, of arrays the numbers: see
    ResultReference. Where the pipeline drew nothing, time and memory are all that is found. CheckFailed, with the
    target, where a result is no number.
    """
    targets = [target for target, _ in judged_as]
    runs, judged, gates, not_run = dict[str, Run](), {}, {}, not_runnable(targets)
    variants, outside, judge = {}, dict[str, Run](), ProgramJudge(originals, program.output, judges)
    arguments = arguments_of(program, originals)
    every = zip(originals.every, [*arguments, arguments[0]], strict=False)
    jobs = [bundled.Job(each.prompts, each.seeds, given, strangers=each is originals.outside) for each, given in every]
    for target, policy in ((target, policy) for target, policy in judged_as if target.id not in not_run):
        with stages.stage(f"evaluate {target.id}") as advance:
            try:
                made = run_isolated(bundled.run_program, folder, target.id, policy, jobs, advance=advance)
            except NumericalError as error:
                raise CheckFailed(
                    f"{target.id} gives what is no number, where the pipeline gives numbers; nothing was published",
                    got=error.message,
                    hint="a precision with more range, such as bf16 in place of fp16, or fp32",
                ) from error
            found = [read_run(result, made.peak_memory_mb) for result in made.result]
            quality, metrics = judge(found)
        measured = performance(originals.timed, found[0], {}).model_copy(update={"residency": policy})
        runs[target.id] = found[0]
        variants[target.id] = tuple(zip(found, metrics, strict=False))
        if originals.outside:
            outside[target.id] = found[-1]
        judged[target.id] = target.model_copy(update={"quality": quality, "performance": measured})
        gates[target.id] = apply_gate(gate, quality) if quality else ()
    all_targets = tuple(judged.get(target.id, target) for target in targets)
    return ProgramJudged(all_targets, runs, gates, not_run, variants, outside)


def arguments_of(program: Program, originals: PipelineOriginals) -> list[dict[str, Any]]:
    """By variant, what a run is given besides a text: pictures, and what chooses the variant."""
    return [
        {**original.given, **{name: variant.fixed[name] for name in program.listed}}
        for original, variant in zip(originals.variants, program.every, strict=True)
    ]


class ProgramJudge:
    """Measures runs against what a pipeline drew; what belongs to the originals alone is computed once."""

    def __init__(self, originals: PipelineOriginals, kind: Output, judges: Judges = NOBODY) -> None:
        self._record, self._drawn = judges.record, all(each.run for each in originals.every)
        if not self._drawn:
            return
        self._variants = [ResultReference(each, kind, judges.reference) for each in originals.variants]
        strangers = originals.outside
        self._outside = ResultReference(strangers, kind, judges.outside) if strangers else None

    def __call__(self, runs: Sequence[Run]) -> tuple[Quality | None, list[Metrics]]:
        """Of all held-out prompts together, and of each variant; `runs`: of each, and then of prompts out of the
        family. Nothing, where there is nothing to compare with."""
        if not self._drawn:
            return None, [Metrics() for _ in runs]
        samples = [each.sample(run.images) for each, run in zip(self._variants, runs, strict=False)]
        outside = Comparison(**compare(self._outside.sample(runs[-1].images))) if self._outside else None
        floors: Any = {"precision": Metrics(), "seed": Metrics()}  # not measured
        quality = Quality(**compare(pool(samples)), **self._record, noise_floor=floors, out_of_family=outside)
        return quality, [summarise(each) for each in samples]


def pool(samples: Sequence[Samples]) -> Samples:
    """All together; what was not sampled of each is not there."""
    common = [name for name in samples[0] if all(name in each for each in samples)]
    return {name: np.concatenate([each[name] for each in samples]) for name in common}


class ResultReference:
    """The results that others are measured against: of pictures all metrics; of sounds and arrays the PSNR alone, whose
    peak is the originals' largest number."""

    def __init__(
        self, originals: VariantOriginals, kind: Output, refer: Callable[[Floats, Prompts], Reference]
    ) -> None:
        """`refer`: makes the reference of pictures and their prompts; each frame of a video is one."""
        self._results = results = originals.laid(kind)
        self._pictures = None
        if kind not in NUMBERS:
            pictures = as_pictures(results)
            frames = len(pictures) // len(results)
            self._pictures = refer(pictures, tuple(np.repeat(np.array(originals.prompts, object), frames)))

    def sample(self, found: Floats) -> Samples:
        """Of the same prompts and noise."""
        if self._pictures:
            return self._pictures.sample(as_pictures(found))
        scale = np.float32(np.abs(self._results).max() or 1)
        pairs = zip(self._results / scale, found.reshape(self._results.shape) / scale, strict=True)
        return {"psnr": np.array([psnr(a, b) for a, b in pairs])}


def as_pictures(results: Floats) -> Floats:
    """[n, h, w, c] or [n, frames, h, w, c] as RGB, frames one after another: [m, h, w, 3]."""
    pictures = results.reshape(-1, *results.shape[-3:])[..., :3]
    return np.repeat(pictures, 3, -1) if pictures.shape[-1] == 1 else pictures
