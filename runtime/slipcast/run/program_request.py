"""The arguments of a program's run, checked before any engine runs, each refused by name with what is legal."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slipcast.bundle.program import RUN_ARGUMENTS, ImageSource, Program
from slipcast.errors import RequestError
from slipcast.run.pictures import Floats, read_picture
from slipcast.run.request import check_integer, choose_seeds
from slipcast.run.tokenizer import SHOWN, OnLongPrompt, check_prompts

ProgramOutputType = Literal["pil", "np"]


@dataclass(frozen=True)
class ProgramRequest:
    """A call's arguments, checked and resolved. `texts`: of each image, by argument. `pictures`: by source's value."""

    texts: list[dict[str, str]]
    pictures: dict[str, Floats]
    seeds: tuple[int, ...]
    output_type: ProgramOutputType
    on_long_prompt: OnLongPrompt


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
    for name, value in given.items():
        _check_argument(program, name, value)
    texts = [text for text in _texts(program, given) for _ in range(num_images_per_prompt)]
    seeds = choose_seeds(seed, len(texts))
    return ProgramRequest(texts, _pictures(program, given), seeds, output_type, on_long_prompt)


def _check_argument(program: Program, name: str, value: object) -> None:
    """RequestError where the program has no such argument, or has it fixed at another value."""
    if name in program.arguments or name in program.images:
        return
    if name not in program.fixed:
        legal = [*program.arguments, *program.images, *program.fixed, *RUN_ARGUMENTS]
        raise RequestError(f"this bundle has no argument {name!r}", expected=", ".join(legal), got=name)
    fixed = program.fixed[name]
    same_kind = isinstance(value, bool) == isinstance(fixed, bool)  # 1 == True in Python
    if not same_kind or not isinstance(value, numbers.Real | str) or value != fixed:
        raise RequestError(
            f"{name} is fixed in this bundle",
            expected=repr(fixed),
            got=repr(value)[:SHOWN],
            hint=f"leave it out, or compile a bundle for another {name}",
        )


def _texts(program: Program, given: Mapping[str, Any]) -> list[dict[str, str]]:
    """By argument, for each prompt: one text goes with all, a list has one for each."""
    lists = {name: check_prompts(name, given[name]) for name in program.arguments if name in given}
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


def _pictures(program: Program, given: Mapping[str, object]) -> dict[str, Floats]:
    found = {}
    for source in program.sources:
        if isinstance(source, ImageSource):
            if source.argument not in given:
                expected = f"an array {list(source.shape)}"
                if source.size:
                    expected = f"a picture, {source.size[2]}x{source.size[1]} or to be resized to it"
                raise RequestError(f"{source.argument} is missing", expected=expected, got="None")
            found[source.value] = read_picture(source, given[source.argument])
    return found
