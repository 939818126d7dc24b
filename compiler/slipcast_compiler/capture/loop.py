"""The loop of a program that slipcast's samplers drive, with numbers of steps and guidance that a run chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slipcast.bundle.sampling import Sampling
from slipcast.errors import RecipeError
from slipcast.sampling.samplers import find_sampler
from slipcast_compiler.capture.columns import Columns, evaluations, find_columns
from slipcast_compiler.capture.cut import Cut, Use, cut_together
from slipcast_compiler.capture.driving import Driven, drive, drive_again, not_driven
from slipcast_compiler.capture.labels import kind_of
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.unguided import Plain, match_plain

STEPS, GUIDANCE = "num_inference_steps", "guidance_scale"
MANY = 20
DENOISER, START = "denoiser", "start"


@dataclass(frozen=True)
class Loop:
    """`use`: an evaluation of the model, between the uses of the cut before `at` and those from there on. It leads from
    the value `sample` to `output`; the sampler, from `sample` to `result`. `vp`: whether `sample` is in
    variance-preserving coordinates. `columns`: by part, what its table's numbers are; those of None are as in the
    row of its use. `steps`, `guidance`: the arguments that a run chooses by; None where it cannot. `unguided`: an
    evaluation without guidance, where there was one to find; else `why_guided`, if it was looked for."""

    sampling: Sampling
    use: Use
    at: int
    sample: int
    output: int
    result: int
    vp: bool
    columns: Mapping[str, Columns]
    steps: str | None
    guidance: str | None
    unguided: Plain | None = None
    why_guided: str = ""

    @property
    def free(self) -> tuple[str, ...]:
        """The arguments by which a run chooses."""
        return tuple(name for name in (self.steps, self.guidance) if name)


@dataclass(frozen=True)
class Captured:
    """A program with those of the same call for other numbers of steps, and for another guidance, if that could be
    captured; and what they were captured with. `unguided`: those without guidance, for both numbers of steps, if they
    are asked for and could be captured; `why_guided`: why they could not."""

    program: Program
    steps: int
    other: Program
    other_steps: int
    guidance: float = 1.0
    guided: Program | None = None
    other_guidance: float = 1.0
    unguided: tuple[Program, ...] = ()
    why_guided: str = ""

    @property
    def programs(self) -> list[Program]:
        """Those with guidance."""
        return [self.program, self.other, *([self.guided] if self.guided else [])]


def other_steps(steps: int) -> int:
    """A number of steps of which a schedule has other noise levels; fewer of many, as some schedules have no more."""
    return steps + 2 if steps < MANY else steps // 2


def drive_together(captured: Sequence[Captured], scheduler: Any) -> tuple[tuple[Cut, Loop], ...]:
    """Each program's cut, without the scheduler's arithmetic, and its loop; parts are shared as by cut_together.

    RecipeError where one of them is not driven.
    """
    try:
        cuts = iter(cut_together([program for each in captured for program in (*each.programs, *each.unguided)]))
    except RecipeError as error:
        if not any(each.unguided for each in captured):
            raise
        without = [replace(each, unguided=(), why_guided=error.message) for each in captured]
        return drive_together(without, scheduler)
    found = []
    for each in captured:
        own, plain = [next(cuts) for _ in each.programs], [next(cuts) for _ in each.unguided]
        cut, loop, driven = _drive(each, own, scheduler)
        loop = replace(loop, why_guided=each.why_guided)
        if plain:
            try:
                cut, loop = _with_unguided(each, cut, loop, plain, driven, scheduler)
            except RecipeError as error:
                loop = replace(loop, why_guided=error.message)
        found.append((cut, loop))
    return tuple(found)


def _with_unguided(
    captured: Captured, cut: Cut, loop: Loop, plain: Sequence[Cut], driven: Driven, scheduler: Any
) -> tuple[Cut, Loop]:
    """With an evaluation without guidance beside that with it; RecipeError where there is none."""
    program, other = captured.unguided
    own = drive(program, scheduler, captured.steps)
    if own != driven:
        raise not_driven("without guidance it takes other steps", own.sampling.sampler)
    if not loop.guidance:
        raise not_driven("a run cannot choose its guidance", program.pipeline)
    _check_shared(plain)
    its_cut, its_loop = _without_steps(program, plain[0], own)
    if its_loop.use.part == loop.use.part:
        raise not_driven(f"at {GUIDANCE} = 1 its model is evaluated as at any other", loop.use.part)
    at = [evaluations(each, 1.0) for each in (own, drive(other, scheduler, captured.other_steps))]
    part = next(part for part in its_cut.parts if part.name == its_loop.use.part)
    laws = find_columns(part.name, plain, at)
    if laws is None:
        raise not_driven("its numbers by step are none that slipcast knows", part.name)
    samples = loop.sample, its_loop.sample
    found = match_plain(captured.program, cut.uses[: loop.at], program, its_loop.use, samples)
    halves, halving = [each for each, _ in found.halving], [each for _, each in found.halving]
    uses = (*cut.uses[: loop.at], *halving, *cut.uses[loop.at :])
    return Cut((*cut.parts, *halves, part), uses, cut.steps), replace(
        loop,
        at=loop.at + len(halving),
        unguided=replace(found, use=replace(found.use, outputs=(loop.output,))),
        columns={**loop.columns, **({part.name: laws} if part.table else {})},
    )


def _drive(captured: Captured, cuts: Sequence[Cut], scheduler: Any) -> tuple[Cut, Loop, Driven]:
    driven = drive(captured.program, scheduler, captured.steps)
    at = [evaluations(driven, captured.guidance)]
    free = True
    try:
        other = drive_again(captured.other, driven, captured.other_steps)
    except RecipeError:  # a run can choose its guidance all the same
        free, other = False, drive(captured.other, scheduler, captured.other_steps)
    at.append(evaluations(other, captured.guidance))
    if captured.guided:
        at.append(evaluations(driven, captured.other_guidance))
    _check_shared(cuts)
    columns = {}
    for part in cuts[0].parts:
        if not part.table or part.name.startswith("update"):
            continue
        laws, in_loop = find_columns(part.name, cuts, at), kind_of(part.name) in (DENOISER, START)
        if laws is None and in_loop:
            raise not_driven("its numbers by step are none that slipcast knows", part.name)
        if laws is None or (any(laws) and not in_loop):
            raise not_driven("its numbers of steps, or its guidance, are seen outside of the loop", part.name)
        columns[part.name] = laws
    cut, loop = _without_steps(captured.program, cuts[0], driven)
    made = replace(
        loop,
        sampling=loop.sampling.model_copy(update={"guidance_scale": captured.guidance}),
        columns=columns,
        steps=STEPS if free else None,
        guidance=GUIDANCE if captured.guided else None,
    )
    return cut, made, driven


def _check_shared(cuts: Sequence[Cut]) -> None:
    """RecipeError where other numbers of steps, or another guidance, need other parts than the scheduler's."""
    names = [{part.name for part in cut.parts if not part.name.startswith("update")} for cut in cuts]
    if any(each != names[0] for each in names[1:]):
        others = set().union(*names) - names[0]
        raise not_driven("another number of steps, or guidance, is another program", ", ".join(sorted(others)) or "one")
    if len([name for name in names[0] if kind_of(name) == DENOISER]) != 1:
        raise not_driven("its steps are not of one form", ", ".join(sorted(names[0])))


def _without_steps(program: Program, cut: Cut, driven: Driven) -> tuple[Cut, Loop]:
    """The cut with one evaluation in place of the steps; RecipeError where they are tied to the rest otherwise."""
    marks = program.marks
    places = [place for place, use in enumerate(cut.uses) if kind_of(use.part) == DENOISER]
    inside = [place for place, use in enumerate(cut.uses) if kind_of(use.part) in (DENOISER, "update")]
    before, after = cut.uses[: places[0]], cut.uses[inside[-1] + 1 :]
    if len(places) != len(marks) or inside != list(range(places[0], inside[-1] + 1)):
        raise not_driven("its steps are not one evaluation each", f"{len(places)} evaluations, {len(marks)} steps")
    uses = [cut.uses[place] for place in places]
    for use, mark in zip(uses, marks, strict=True):
        if use.outputs != (mark.output.id,):
            raise not_driven("its scheduler reads more than a prediction", str(len(use.outputs)))
        given = tuple(-1 if value == mark.sample.id else value for value in use.inputs)
        if -1 not in given or given != tuple(-1 if v == marks[0].sample.id else v for v in uses[0].inputs):
            raise not_driven("its evaluations read more of a step before than its latent", use.part)
    made = {value for place in inside for value in cut.uses[place].outputs}
    result = marks[-1].result.id
    read = {value for use in after for value in use.inputs} | {
        found.id for _, found in program.results if hasattr(found, "id")
    }
    if read & made - {result}:
        raise not_driven("more than the last latent is read after its steps", str(len(read & made)))
    vp = driven.sampling.noise.is_flow or find_sampler(driven.sampling.sampler).grid.start == "vp"
    loop = Loop(
        driven.sampling, uses[0], len(before), marks[0].sample.id, marks[0].output.id, result, vp, {}, None, None
    )
    parts = tuple(part for part in cut.parts if not part.name.startswith("update"))
    return Cut(parts, (*before, *after), ()), loop
