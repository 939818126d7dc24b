"""All that an export needs to know of a pipeline, from some captures of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.call import PROMPT, make_call
from slipcast_compiler.capture.cut import Cut, cut_together
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.generalise import generalise, is_of_one_length
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.texts import AWKWARD, SHORT, Template, find_templates, with_others
from slipcast_compiler.host.quiet import quiet

WORDS = (500, 250, 120, 60)  # of the longest text: the first of these numbers that the pipeline does not cut


@dataclass(frozen=True)
class Found:
    """What captures of a pipeline found: the program, its parts, and how texts reach the tokenizers, by source."""

    program: Program
    cut: Cut
    templates: Mapping[int, Template]
    call: Mapping[str, Any]


def find(pipe: Any, given: Mapping[str, Any]) -> Found:
    """Capture pipe(**given) for several prompts; RecipeError where they are not of one program."""
    return find_each(pipe, [given])[0]


def find_each(pipe: Any, calls: Sequence[Mapping[str, Any]]) -> tuple[Found, ...]:
    """The same of several calls, such as for other numbers of steps, which have parts in common."""
    read = [with_pictures(pipe, given) for given in calls]
    return find_for(pipe, [lambda prompt, given=given: make_call(pipe, given, prompt) for given in read])  # type: ignore[misc]


def find_for(pipe: Any, calls: Sequence[Callable[[str], Mapping[str, Any]]]) -> tuple[Found, ...]:
    """The same of each call(prompt): for two prompts, one of them awkward; where their lengths are to be seen in what
    the pipeline does, for a short and a long one too."""
    captured = [_capture(pipe, call) for call in calls]
    cuts = cut_together([program for program, _, _ in captured])
    return tuple(
        Found(program, made, templates, call) for (program, templates, call), made in zip(captured, cuts, strict=True)
    )


def _capture(
    pipe: Any, call: Callable[[str], Mapping[str, Any]]
) -> tuple[Program, Mapping[int, Template], Mapping[str, Any]]:
    """The program, how texts reach its tokenizers, and the call."""
    one, other = call(PROMPT), with_others(call(AWKWARD), lambda text: f"{text} a a a")
    with quiet():
        programs = [capture(pipe, one), capture(pipe, other)]
        program = programs[0]
        if not is_of_one_length(programs):
            programs.append(capture(pipe, with_others(call(SHORT), lambda _: SHORT)))
            program = _up_to_the_longest(pipe, call, programs)
    templates = find_templates((programs[0], programs[1]), (one, other))
    same = zip(programs[0].needed_sources, program.needed_sources, strict=True)
    return program, {its.id: templates[source.id] for source, its in same if source.id in templates}, one


def _up_to_the_longest(pipe: Any, call: Callable[[str], Mapping[str, Any]], programs: list[Program]) -> Program:
    """The program of these and of the longest text with which they have one in common; RecipeError if none has."""
    for words in WORDS:
        texts = [" ".join([SHORT] * count) for count in (words, words - words // 5)]
        longest = with_others(call(texts[0]), lambda _, other=texts[1]: other)  # type: ignore[misc]
        try:
            return generalise([*programs, capture(pipe, longest)])
        except RecipeError:
            if words == WORDS[-1]:
                raise
    raise AssertionError
