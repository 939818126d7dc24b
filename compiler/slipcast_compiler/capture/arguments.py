"""What becomes of a call's arguments: those that a run gives, and those that a bundle has fixed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from slipcast.bundle.program import RUN_ARGUMENTS, TextArgument
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.results import output_of
from slipcast_compiler.capture.texts import Template, texts_of


def text_arguments(templates: Mapping[int, Template], call: Mapping[str, Any]) -> dict[str, TextArgument]:
    """Texts that a run takes. Only the prompt has to be given; others are what they were, unless they are given."""
    used = {template.argument for template in templates.values() if template.argument}
    texts = {name: text for name, text in texts_of(call).items() if name in used}
    return {name: TextArgument(default=None if name == "prompt" else text) for name, text in texts.items()}


def describe_arguments(pipe: Any, found: Found, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plain JSON: `texts` with what they are where none is given, and `pictures`, of which a run gives any; what is
    `listed`, with its values, of which it gives one; what is `fixed`; and what it `gives`. `calls`: as given."""
    texts = text_arguments(found.templates, found.call)
    fixed = [fixed_arguments(pipe, call) for call in calls]
    values = {name: list(dict.fromkeys(each[name] for each in fixed)) for name in fixed[0]}
    return {
        "texts": {name: each.default for name, each in texts.items()},
        "pictures": [source.detail[0] for source in found.program.needed_sources if source.kind == "image"],
        "listed": {name: each for name, each in values.items() if len(each) > 1},
        "fixed": {name: each[0] for name, each in values.items() if len(each) == 1},
        "gives": output_of(found.program, pipe, fixed[0])[0],
    }


def render_arguments(arguments: Mapping[str, Any], lengths: Mapping[str, Sequence[int]]) -> list[str]:
    """Lines that say what a run may choose."""
    usual = {name: "to be given" if text is None else repr(text) for name, text in arguments["texts"].items()}
    free = ["seed", *(f"{name} ({text})" for name, text in usual.items()), *dict.fromkeys(arguments["pictures"])]
    listed = [f"{name}: {', '.join(map(repr, values))}" for name, values in arguments["listed"].items()]
    tokens = [f"{name} {least} to {most}" for name, (least, most) in lengths.items()]
    fixed = [f"{name}={value!r}" for name, value in arguments["fixed"].items()]
    shown = {"free": free, "listed": listed, "tokens": tokens, "fixed": fixed, "gives": [arguments["gives"]]}
    return ["arguments of a run", *(f"  {name:<7} {', '.join(each)}" for name, each in shown.items() if each)]


def fixed_arguments(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """What the call had besides, that can be said in a word."""
    usual = {
        name: each.default
        for name, each in inspect.signature(type(pipe).__call__).parameters.items()
        if each.default is not inspect.Parameter.empty
    }
    given = usual | dict(call)
    skipped = {"return_dict", *RUN_ARGUMENTS, *texts_of(call)}
    return {k: v for k, v in given.items() if isinstance(v, int | float | str | bool) and k not in skipped}
