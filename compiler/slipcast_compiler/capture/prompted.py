"""The program of a call for prompts of any length, of captures for some."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.call import PROMPT
from slipcast_compiler.capture.generalise import generalise, unify, without_insides
from slipcast_compiler.capture.laws import DISTINCT, PADDED
from slipcast_compiler.capture.program import Call, Program
from slipcast_compiler.capture.ranges import count_of, extend, form_of, is_within, wiring_of, without_small_sizes
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.shapes import ShapeRunner
from slipcast_compiler.capture.texts import (
    AWKWARD,
    OTHER_PROMPT,
    SHORT,
    UNQUOTED,
    Template,
    find_templates,
    with_others,
)
from slipcast_compiler.host.quiet import quiet

# Of a text: the first that the pipeline does not cut is the longest; together they tell laws that pad.
WORDS = (500, 250, 120, 60, 90, 75, 45, 30, 15, 10, 4)
Make = Callable[[str], Mapping[str, Any]]  # from a prompt to a call


@dataclass(frozen=True)
class Capturing:
    """Captures pipe(**call(prompt)). `others`: whether its other prompts are of other lengths then, too; else they are
    as the call has them, and no run chooses them. `shapes`: what ran in other captures."""

    pipe: Any
    call: Make
    others: bool = True
    shapes: ShapeRunner = field(default_factory=ShapeRunner)

    def __call__(self, prompt: str) -> Program:
        words = len(prompt.split())
        changes: dict[str, Callable[[str], str]] = {
            PROMPT: lambda text: text,
            AWKWARD: lambda text: f"{text} a a a",
            UNQUOTED: lambda text: f"{text} a a a",
            SHORT: lambda _: SHORT,
        }
        change = changes.get(prompt, lambda _: _words(words - words // 5))
        return capture(self.pipe, self.given(prompt, change), self.shapes)

    def given(self, prompt: str, change: Callable[[str], str]) -> Mapping[str, Any]:
        """The call for a prompt, with its other prompts changed."""
        return with_others(self.call(prompt), change) if self.others else self.call(prompt)


@dataclass(frozen=True)
class Prompted:
    """A program, how texts reach its tokenizers, by source, and the call. `prompts`: on which it has to be verified;
    those whose captures left out some of its operators, such as padding where none was missing, are among them.
    `captured`: the prompts that it was made of. `opaque`: whether what calls do inside is left out."""

    program: Program
    templates: Mapping[int, Template]
    call: Mapping[str, Any]
    prompts: tuple[str, ...]
    captured: tuple[str, ...]
    opaque: bool
    capturing: Capturing


def capture_prompted(pipe: Any, call: Make) -> Prompted:
    """Capture pipe(**call(prompt)) for two prompts, one of them awkward; where their lengths are to be seen in what it
    does, for a short and a long one too. Where quoted words go another way, of texts without quotation marks. Where
    two lengths together decide what it does, of one: the other prompts stay as they are.

    RecipeError where captures are not of one program.
    """
    capturing = Capturing(pipe, call)
    try:
        found = _capture_for(capturing, AWKWARD)
    except RecipeError as refused:
        for each, awkward in ((capturing, UNQUOTED), (replace(capturing, others=False), AWKWARD)):
            with contextlib.suppress(RecipeError):
                found = _capture_for(each, awkward)
                break
        else:
            raise refused from None
        if awkward == UNQUOTED:
            by_source = found.templates.items()
            return replace(found, templates={value: replace(each, unquoted=True) for value, each in by_source})
    if found.opaque and len(found.program.lengths) > 1:
        with contextlib.suppress(RecipeError):
            of_one = _capture_for(replace(capturing, others=False), AWKWARD)
            return found if of_one.opaque else of_one
    return found


def capture_again(call: Make, prompted: Prompted) -> Program:
    """What is the same as a program but for a number in the call: for the prompts that it was made of, if it follows
    their lengths, else for one. RecipeError where captures are not of one program."""
    capturing = replace(prompted.capturing, call=call)
    with quiet():
        if not prompted.program.lengths:
            programs = [capturing(PROMPT)]
        else:
            programs = [capturing(prompt) for prompt in prompted.captured]
    programs = [without_insides(program) for program in programs] if prompted.opaque else programs
    program = generalise(programs)
    if len(program.lengths) != len(prompted.program.lengths):
        return program
    pairs = zip(program.lengths, prompted.program.lengths, strict=True)
    lengths = tuple(replace(own, minimum=its.minimum, maximum=its.maximum) for own, its in pairs)
    return replace(program, lengths=lengths)


def _words(count: int) -> str:
    return " ".join([SHORT] * count)


def _capture_for(capturing: Capturing, awkward: str) -> Prompted:
    with quiet():
        captured = {prompt: capturing(prompt) for prompt in (PROMPT, awkward)}
        first, second = captured.values()
        program = unify([first, second])
        made = _Made(program, (PROMPT,)) if program else _for_lengths(capturing, captured)
    one, other = capturing.call(PROMPT), capturing.given(awkward, lambda text: f"{text} a a a")
    templates = find_templates((first, second), (one, other))
    same = zip(first.needed_sources, made.program.needed_sources, strict=True)
    by_source = {its.id: templates[source.id] for source, its in same if source.id in templates}
    others = (OTHER_PROMPT,) if made.program.lengths else ()  # of a length that was not captured
    prompts = tuple(dict.fromkeys((awkward, *others, *made.unlike)))
    return Prompted(made.program, by_source, one, prompts, made.captured, made.opaque, capturing)


@dataclass(frozen=True)
class _Made:
    program: Program
    captured: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    opaque: bool = False


def _for_lengths(capturing: Capturing, given: Mapping[str, Program]) -> _Made:
    """Of the longest text with which these and a short one have a program in common; if none has, of the texts for
    which most is done, to be verified on the others. RecipeError where there is none."""
    few = {**given, SHORT: capturing(SHORT)}
    captured = dict(few)
    for text in map(_words, WORDS):
        try:
            captured[text] = capturing(text)
            return _Made(generalise([*few.values(), captured[text]]), (*few, text))
        except RecipeError as error:  # of the pipeline, which may take no text of this length, or of what was captured
            refused = error
        if found := _of_alike(captured, PADDED):
            return found
    return _of_alike(captured, 2) or _of_a_range(captured) or _of_opaque_calls(captured, refused)


def _of_alike(captured: Mapping[str, Program], least: int) -> _Made | None:
    """Of the texts for which the same is done, and most, if there are at least so many."""
    for alike in _alike(captured):
        unlike = {text: program for text, program in captured.items() if text not in alike}
        if len(alike) >= least and all(is_within(program, next(iter(alike.values()))) for program in unlike.values()):
            with contextlib.suppress(RecipeError):
                return _Made(extend(generalise([*alike.values()]), [*unlike.values()]), tuple(alike), tuple(unlike))
    return None


def _of_a_range(captured: Mapping[str, Program]) -> _Made | None:
    """Of the texts for which the same is done as for the first two, where those of which it is not are all shorter, or
    longer: a run refuses them."""
    first, second, *_ = captured
    alike = next(group for group in _alike(captured) if first in group)
    unlike = [program for text, program in captured.items() if text not in alike]
    kinds = {tuple((source.kind, source.detail) for source in program.needed_sources) for program in captured.values()}
    if second not in alike or len(alike) < DISTINCT or len(kinds) > 1:
        return None
    try:
        program = generalise([*alike.values()])
    except RecipeError:
        return None
    if len(program.lengths) != 1:
        return None
    (length,) = program.lengths
    others = [count_of(program, length, other) for other in unlike]
    if any(length.minimum <= each <= length.maximum for each in others):
        return None
    return _Made(without_small_sizes(program), tuple(alike))


def _of_opaque_calls(captured: Mapping[str, Program], refused: RecipeError) -> _Made:
    """The same where what components do inside cannot be made one: they may follow sizes by themselves, if they read no
    numbers."""
    inside = (event.inside for program in captured.values() for event in program.events if isinstance(event, Call))
    if any(each and each.guards for each in inside):
        raise refused
    opaque = {text: without_insides(program) for text, program in captured.items()}
    texts = tuple(opaque)
    few = [opaque.pop(text) for text in texts[:3]]
    if program := unify(few[:2]):
        return _Made(program, (PROMPT,), opaque=True)
    for text, longest in opaque.items():
        with contextlib.suppress(RecipeError):
            return _Made(generalise([*few, longest]), (*texts[:3], text), opaque=True)
    raise refused


def _alike(programs: Mapping[str, Program]) -> list[dict[str, Program]]:
    """By text, those that run the same operators on the same values; first those that run the most of them."""
    groups: dict[Any, dict[str, Program]] = {}
    for text, program in programs.items():
        groups.setdefault((form_of(program), wiring_of(program)), {})[text] = program
    return [groups[form] for form in sorted(groups, key=lambda form: len(form[0]), reverse=True)]
