"""What becomes of a call's arguments: those that a run gives, and those that a bundle has fixed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from slipcast.bundle.program import RUN_ARGUMENTS, TextArgument
from slipcast_compiler.capture.blocks import OUTPUT, is_of_blocks, parameters_of
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.loop import Loop
from slipcast_compiler.capture.results import output_of
from slipcast_compiler.capture.texts import Template, texts_of


def text_arguments(templates: Mapping[int, Template], call: Mapping[str, Any]) -> dict[str, TextArgument]:
    """Texts that a run takes. Only the prompt has to be given; others are what they were, unless they are given."""
    used = {template.argument for template in templates.values() if template.argument}
    texts = {name: text for name, text in texts_of(call).items() if name in used}
    return {name: TextArgument(default=None if name == "prompt" else text) for name, text in texts.items()}


def describe_arguments(pipe: Any, variants: Sequence[Found], calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plain JSON: `texts` with what they are where none is given, and `pictures`, of which a run gives any; `numbers`
    that it chooses, likewise, or `why_not`; what is `listed`, with its values, of which it gives one; what is `fixed`;
    and what it `gives`. `calls`: as given."""
    found, loop = variants[0], variants[0].loop
    texts = text_arguments(found.templates, found.call)
    fixed = [fixed_arguments(pipe, {**texts_of(found.call), **call}, loop) for call in calls]
    usual = {loop.steps: loop.sampling.steps, loop.guidance: loop.sampling.guidance_scale} if loop else {}
    pictures = [source.detail[0] for source in found.program.needed_sources if source.kind == "image"]
    names = [name for name in fixed[0] if name not in pictures]
    values = {name: list(dict.fromkeys(each[name] for each in fixed if name in each)) for name in names}
    return {
        "texts": {name: each.default for name, each in texts.items()},
        "pictures": pictures,
        "numbers": {name: value for name, value in usual.items() if name},
        "why_not": found.why_not,
        "listed": {name: each for name, each in values.items() if len(each) > 1},
        "fixed": {name: each[0] for name, each in values.items() if len(each) == 1},
        "gives": output_of(found.program, pipe, fixed[0]).kind,
    }


def render_arguments(arguments: Mapping[str, Any], lengths: Mapping[str, Sequence[int]]) -> list[str]:
    """Lines that say what a run may choose."""
    usual = {name: "to be given" if text is None else repr(text) for name, text in arguments["texts"].items()}
    usual |= {name: f"{number:g}" for name, number in arguments["numbers"].items()}
    free = ["seed", *(f"{name} ({text})" for name, text in usual.items()), *dict.fromkeys(arguments["pictures"])]
    listed = [f"{name}: {', '.join(map(repr, values))}" for name, values in arguments["listed"].items()]
    tokens = [f"{name} {least} to {most}" for name, (least, most) in lengths.items()]
    fixed = [f"{name}={value!r}" for name, value in arguments["fixed"].items()]
    shown = {"free": free, "listed": listed, "tokens": tokens, "fixed": fixed, "gives": [arguments["gives"]]}
    if arguments["why_not"]:
        shown["steps"] = [f"the scheduler's own: {arguments['why_not']}"]
    return ["arguments of a run", *(f"  {name:<7} {', '.join(each)}" for name, each in shown.items() if each)]


def fixed_arguments(pipe: Any, call: Mapping[str, Any], loop: Loop | None) -> dict[str, Any]:
    """What the call had besides, that can be said in a word, and that no run chooses."""
    known = parameters_of(pipe, call).items()
    usual = {name: each.default for name, each in known if each.default is not inspect.Parameter.empty}
    given = usual | dict(call)
    own = {OUTPUT} if is_of_blocks(pipe) else set()
    skipped = {"return_dict", *own, *RUN_ARGUMENTS, *texts_of(call), *(loop.free if loop else ())}
    return {k: v for k, v in given.items() if isinstance(v, int | float | str | bool) and k not in skipped}
