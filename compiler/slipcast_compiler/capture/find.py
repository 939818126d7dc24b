"""All that an export needs to know of a pipeline, from some captures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.blocks import parameters_of
from slipcast_compiler.capture.call import PROMPT, make_call
from slipcast_compiler.capture.cut import Cut, cut_together
from slipcast_compiler.capture.driving import check_form, not_driven
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.loop import GUIDANCE, STEPS, Captured, Loop, drive_together, other_steps
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.prompted import Make, Prompted, capture_again, capture_prompted
from slipcast_compiler.capture.record import find_scheduler
from slipcast_compiler.capture.texts import Template
from slipcast_compiler.capture.tiles import in_tiles


@dataclass(frozen=True)
class Wanted:
    """What else is looked for: `unguided`: what loops do without guidance. `tile`: decoders that are called in tiles
    of so many cells of the latent, of which neighbours share `overlap`."""

    unguided: bool = False
    tile: int | None = None
    overlap: int = 0


NOTHING = Wanted()


@dataclass(frozen=True)
class Found:
    """What captures of a pipeline found: the program, its parts, and how texts reach the tokenizers, by source.

    `loop`: how slipcast's samplers drive it, where they do: then its parts are without the scheduler's arithmetic.
    `why_not`: where they do not. `prompts`: on which the program has to be verified.
    """

    program: Program
    cut: Cut
    templates: Mapping[int, Template]
    call: Mapping[str, Any]
    prompts: tuple[str, ...]
    loop: Loop | None = None
    why_not: str = ""


def find(pipe: Any, given: Mapping[str, Any]) -> Found:
    """Capture pipe(**given) for several prompts; RecipeError where they are not of one program."""
    return find_each(pipe, [given])[0]


def find_each(pipe: Any, calls: Sequence[Mapping[str, Any]], wanted: Wanted = NOTHING) -> tuple[Found, ...]:
    """The same of several calls, such as for other sizes, which have parts in common."""
    read = [with_pictures(pipe, given) for given in calls]
    makes: list[Any] = [lambda prompt, given=given: make_call(pipe, given, prompt) for given in read]
    return find_for(pipe, makes, wanted)


def find_for(pipe: Any, calls: Sequence[Make], wanted: Wanted = NOTHING) -> tuple[Found, ...]:
    """The same of each call(prompt): for two prompts, one of them awkward; where their lengths are to be seen in what
    the pipeline does, for a short and a long one too. Where slipcast's samplers can stand for the scheduler, for
    another number of steps and another guidance too, as a run may choose them."""
    captured = [capture_prompted(pipe, call) for call in calls]
    programs = [each.program for each in captured]
    loops: Sequence[Loop | None]
    try:
        cuts, loops = zip(*_drive(pipe, _capture_others(pipe, calls, captured, wanted.unguided)), strict=True)
        why_not = ""
    except RecipeError as error:
        cuts, loops, why_not = cut_together(programs), [None] * len(programs), error.message
    if wanted.tile:
        cuts = in_tiles(programs, cuts, pipe, wanted.tile, wanted.overlap)
    return tuple(
        Found(each.program, cut, each.templates, each.call, each.prompts, loop, why_not)
        for each, cut, loop in zip(captured, cuts, loops, strict=True)
    )


def _drive(pipe: Any, captured: Sequence[Captured]) -> tuple[tuple[Cut, Loop], ...]:
    """With steps and guidance, or with steps alone, that a run chooses; RecipeError where it chooses nothing."""
    scheduler = find_scheduler(pipe)
    try:
        return drive_together(captured, scheduler)
    except RecipeError:
        if not any(each.guided for each in captured):
            raise
    return drive_together([replace(each, guided=None) for each in captured], scheduler)


def _capture_others(pipe: Any, calls: Sequence[Make], captured: Sequence[Prompted], unguided: bool) -> list[Captured]:
    """Each program beside those for other steps and another guidance, and without; RecipeError where a run cannot
    choose."""
    found = []
    for make, prompted in zip(calls, captured, strict=True):
        program, steps = prompted.program, prompted.call.get(STEPS)
        if not isinstance(steps, int) or len({each.call.get(STEPS) for each in captured}) > 1:
            raise not_driven("its numbers of steps are listed", str(steps))
        check_form(program)
        again = other_steps(steps)
        other = capture_again(_with(make, STEPS, again), prompted)
        guided = _guided(pipe, make, prompted, captured)
        plain = _unguided(make, prompted, guided, again) if unguided else {}
        found.append(Captured(program, steps, other, again, **guided, **plain))
    return found


def _unguided(make: Make, prompted: Prompted, guided: Mapping[str, Any], again: int) -> dict[str, Any]:
    """The programs without guidance, for both numbers of steps, or why there are none."""
    if not guided:
        return {"why_guided": f"its {GUIDANCE} is no number above 1 that a run could change"}
    plain = _with(make, GUIDANCE, 1.0)
    try:
        return {"unguided": tuple(capture_again(each, prompted) for each in (plain, _with(plain, STEPS, again)))}
    except RecipeError as error:
        return {"why_guided": f"without guidance it cannot be captured: {error.message}"}


def _guided(pipe: Any, make: Make, prompted: Prompted, captured: Sequence[Prompted]) -> dict[str, Any]:
    """The program for another guidance, and both scales; nothing where there is no other, or where it is listed."""
    call = make(PROMPT)
    parameter = parameters_of(pipe).get(GUIDANCE)
    scale = call.get(GUIDANCE, parameter.default if parameter else None)
    listed = len({each.call.get(GUIDANCE) for each in captured}) > 1
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 1 or listed:
        return {}
    try:
        guided = capture_again(_with(make, GUIDANCE, float(scale) + 1), prompted)
    except RecipeError:
        return {}
    return {"guidance": float(scale), "guided": guided, "other_guidance": float(scale) + 1}


def _with(make: Make, name: str, value: Any) -> Make:
    return lambda prompt: {**make(prompt), name: value}
