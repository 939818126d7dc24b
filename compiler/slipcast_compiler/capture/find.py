"""All that an export needs to know of a pipeline, from two captures of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.cut import Cut, cut
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.texts import AWKWARD, Template, find_templates
from slipcast_compiler.capture.verify import compare_sources
from slipcast_compiler.host.quiet import quiet


@dataclass(frozen=True)
class Found:
    """What two captures of a pipeline found: the program, its parts, and how texts reach the tokenizers, by source."""

    program: Program
    cut: Cut
    templates: Mapping[int, Template]
    call: Mapping[str, Any]


def find(pipe: Any, given: Mapping[str, Any]) -> Found:
    """Capture pipe(**given) for two prompts, one of them awkward; RecipeError where they are not of one program."""
    return find_between(pipe, make_call(pipe, given), make_call(pipe, given, prompt=AWKWARD))


def find_between(pipe: Any, one: Mapping[str, Any], other: Mapping[str, Any]) -> Found:
    """The same of two calls, which differ in their texts alone."""
    with quiet():
        programs = capture(pipe, one), capture(pipe, other)
    if mismatch := compare_sources(*programs):
        raise RecipeError(
            f"{programs[0].pipeline}: the length of a prompt decides what the pipeline does",
            expected="prompts that are padded to one length",
            got=mismatch,
            hint="an argument of the pipeline may pad them; other lengths come with a later version",
        )
    return Found(programs[0], cut(programs[0]), find_templates(programs, (one, other)), one)
