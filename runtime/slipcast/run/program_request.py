"""The arguments of a program's run, checked before any engine runs, each refused by name with what is legal."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from slipcast.bundle.program import RUN_ARGUMENTS, Loop, Program, Variant
from slipcast.bundle.records import GuardPolicy
from slipcast.bundle.sources import ImageSource
from slipcast.errors import RequestError
from slipcast.run.pictures import Floats, read_picture
from slipcast.run.prompt_table import check_listed
from slipcast.run.request import check_integer, choose_seeds, lay_steps
from slipcast.run.tokenizer import SHOWN, OnLongPrompt, check_prompts
from slipcast.sampling.schedules import NoiseProcess, Schedule

MOST_GUIDANCE = 1000
ProgramOutputType = Literal["pil", "np"]


@dataclass(frozen=True)
class ProgramRequest:
    """A call's arguments, checked and resolved. `variant`: its place in Program.every. `schedule` and `guidance`: of
    its loop, if it has one. `texts`: of each image, by argument. `pictures`: by source's value. `arguments`: as they
    were given."""

    variant: int
    schedule: Schedule
    guidance: float
    texts: list[dict[str, str]]
    pictures: dict[str, Floats]
    seeds: tuple[int, ...]
    output_type: ProgramOutputType
    on_long_prompt: OnLongPrompt
    guard: GuardPolicy = "warn"
    arguments: Mapping[str, object] = field(default_factory=dict)

    def only(self, images: Sequence[int]) -> ProgramRequest:
        """For some of the images."""
        texts, seeds = [self.texts[image] for image in images], tuple(self.seeds[image] for image in images)
        return replace(self, texts=texts, seeds=seeds)


def for_strangers(request: ProgramRequest, loop: Loop | None) -> ProgramRequest:
    """What is asked for, of the `loop` that strangers are drawn by: at its own steps and guidance where none are asked
    for. RequestError for a number of steps that it cannot take."""
    if not loop:
        return request
    steps: Any = request.arguments.get(loop.steps or "")
    as_usual = request.arguments.get(loop.guidance or "") is None
    guidance = loop.sampling.guidance_scale if as_usual else request.guidance
    return replace(request, schedule=lay_steps(loop.sampling, steps), guidance=guidance)


def check_program_request(
    program: Program,
    arguments: Mapping[str, object],
    *,
    seed: Any,
    num_images_per_prompt: int,
    output_type: Any,
    on_long_prompt: Any,
) -> ProgramRequest:
    """The arguments of ProgramPipeline.__call__, resolved; `arguments`: those that the program gives names to, of which
    None is none. RequestError with what is legal for the first that is not."""
    check_integer("num_images_per_prompt", num_images_per_prompt, 1, 4096)
    for name, value, legal in (
        ("output_type", output_type, ("pil", "np")),
        ("on_long_prompt", on_long_prompt, ("warn", "error")),
    ):
        if value not in legal:
            raise RequestError(f"{name} is not usable", expected=" or ".join(legal), got=repr(value)[:SHOWN])
    given = {name: value for name, value in arguments.items() if value is not None}
    place = _choose(program, given)
    texts = [text for text in _texts(program, given) for _ in range(num_images_per_prompt)]
    seeds = choose_seeds(seed, len(texts))
    pictures = _pictures(program.every[place], given)
    schedule, guidance = _sampling(program.every[place].loop, given)
    return ProgramRequest(
        place, schedule, guidance, texts, pictures, seeds, output_type, on_long_prompt, arguments=given
    )


NO_STEPS = Schedule((), (), NoiseProcess())


def _sampling(loop: Loop | None, given: Mapping[str, Any]) -> tuple[Schedule, float]:
    """The schedule and the guidance that are asked for; RequestError with what is legal."""
    if not loop:
        return NO_STEPS, 1.0
    schedule = lay_steps(loop.sampling, given.get(loop.steps or ""))
    scale = given.get(loop.guidance or "", loop.sampling.guidance_scale)
    # Where a loop has evaluations without guidance, all of them can be.
    number = isinstance(scale, int | float | np.number) and not isinstance(scale, bool)
    fits = number and (scale >= 1 if loop.unguided else scale > 1) and scale <= MOST_GUIDANCE
    if loop.guidance in given and not fits:
        raise RequestError(
            f"{loop.guidance} is not usable in this bundle",
            expected=f"a number {'from 1' if loop.unguided else 'above 1,'} to {MOST_GUIDANCE}",
            got=repr(scale)[:SHOWN],
            hint=f"leave it out, or compile a bundle for this {loop.guidance}: without guidance it is another program",
        )
    return schedule, float(scale)


def _choose(program: Program, given: Mapping[str, object]) -> int:
    """The first variant that is as it is asked for; RequestError where there is none, with what is legal."""
    pictures = dict.fromkeys(name for variant in program.every for name in variant.images)
    loop = program.loop
    free = loop.free if loop else ()
    known = {*program.arguments, *pictures, *free, *([loop.steps] if loop and loop.steps else [])}
    asked = {name: value for name, value in given.items() if name not in known}
    for name, value in asked.items():
        if name not in program.fixed:
            legal = [*program.arguments, *pictures, *free, *program.fixed, *RUN_ARGUMENTS]
            raise RequestError(f"this bundle has no argument {name!r}", expected=", ".join(legal), got=name)
        if not any(_is_same(value, variant.fixed[name]) for variant in program.every):
            listed = program.listed.get(name, (program.fixed[name],))
            raise RequestError(
                f"{name} is {'one of a few' if len(listed) > 1 else 'fixed'} in this bundle",
                expected=_either([repr(each) for each in listed]),
                got=repr(value)[:SHOWN],
                hint=f"leave it out, or compile a bundle for another {name}",
            )
    for place, variant in enumerate(program.every):
        if all(_is_same(value, variant.fixed[name]) for name, value in asked.items()):
            return place
    names = [name for name in program.listed if name in asked]
    together = dict.fromkeys(_told(variant, names) for variant in program.every)
    raise RequestError(
        f"{' and '.join(names)} do not go together in this bundle",
        expected=_either(list(together)),
        got=", ".join(f"{name}={asked[name]!r}" for name in names)[:SHOWN],
        hint="give one of them, or compile a bundle for both",
    )


def _is_same(value: object, fixed: object) -> bool:
    same_kind = isinstance(value, bool) == isinstance(fixed, bool)  # 1 == True in Python
    return same_kind and isinstance(value, numbers.Real | str) and value == fixed


def _told(variant: Variant, names: Sequence[str]) -> str:
    return " with ".join(f"{name}={variant.fixed[name]!r}" for name in names)


def _either(values: Sequence[str]) -> str:
    return ", ".join(values[:-1]) + " or " * (len(values) > 1) + values[-1]


def _texts(program: Program, given: Mapping[str, Any]) -> list[dict[str, str]]:
    """By argument, for each prompt: one text goes with all, a list has one for each."""
    lists = {name: check_prompts(name, given[name]) for name in program.arguments if name in given}
    if program.closed and "prompt" in lists:
        check_listed("prompt", lists["prompt"], program.closed.prompts)
    longest = max(lists, key=lambda name: len(lists[name]), default=None)
    count = len(lists[longest]) if longest else 1
    for name, texts in lists.items():
        if len(texts) not in (1, count):
            raise RequestError(
                f"{name} does not go with {longest}", expected=f"one text, or {count}", got=str(len(texts))
            )
    found: list[dict[str, str]] = [{} for _ in range(count)]
    ordered = sorted(program.arguments.items(), key=lambda item: item[1].same_as is not None)
    for name, argument in ordered:  # those that are as others after them
        for place, texts_of_one in enumerate(found):
            if name in lists:
                texts_of_one[name] = lists[name][place if len(lists[name]) > 1 else 0]
            elif argument.same_as is not None:
                texts_of_one[name] = texts_of_one[argument.same_as]
            elif argument.default is not None:
                texts_of_one[name] = argument.default
            else:
                raise RequestError(f"{name} is missing", expected="a string or a non-empty list of strings", got="None")
    return found


def _pictures(variant: Variant, given: Mapping[str, object]) -> dict[str, Floats]:
    """By source's value."""
    found = {}
    for name, sources in variant.images.items():
        if name not in given:
            raise RequestError(f"{name} is missing", expected=_wanted(sources), got="None")
        value: Any = given[name]
        if sources[0].place is not None and not (isinstance(value, list | tuple) and len(value) == len(sources)):
            got = f"a list of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__
            raise RequestError(f"{name} is a list in this bundle", expected=_wanted(sources), got=got)
        for source in sources:
            found[source.value] = read_picture(source, value if source.place is None else value[source.place])
    return found


def _wanted(sources: Sequence[ImageSource]) -> str:
    """What an argument takes."""
    each = f"an array {list(sources[0].shape)}"
    if size := sources[0].size:
        each = f"a picture, {size[2]}x{size[1]} or to be resized to it"
    return each if sources[0].place is None else f"a list of {len(sources)}, the first {each}"
