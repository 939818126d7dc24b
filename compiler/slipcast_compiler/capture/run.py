"""From a model's directory to what its pipeline does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.arguments import describe_arguments, render_arguments
from slipcast_compiler.capture.call import PROMPT, make_call, with_other_pictures
from slipcast_compiler.capture.find import Found, find_each
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.listed import combinations
from slipcast_compiler.capture.open import open_with_weights, open_without_weights
from slipcast_compiler.capture.parts import describe_parts, render_parts
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.summary import render, summarise
from slipcast_compiler.capture.texts import OTHER_PROMPT
from slipcast_compiler.capture.verify import Verdict, verify
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.links import plainly_named
from slipcast_compiler.recipe.reading import parse_override


def capture_model(root: Path, pipeline: str | None, overrides: Sequence[str], check: bool) -> dict[str, Any]:
    """Capture the pipeline of a directory, from its configs alone; with `check`, verify it with its weights.

    RecipeError where there is no such directory.
    """
    if not root.is_dir():
        got = "a file" if root.exists() else "no such directory"
        raise RecipeError(f"{root}: nothing to capture", expected="a diffusers directory", got=got)
    given: dict[str, Any] = {}
    for override in overrides:
        parse_override(given, override)
    root = plainly_named(root, None)
    pipe = open_without_weights(root, pipeline)
    calls = combinations(pipe, given)
    try:
        variants = find_each(pipe, calls)
        program, found = variants[0].program, _describe(pipe, variants, calls)
    except RecipeError as error:  # for prompts of several lengths; of one it can be said what it does
        found = {"parts": {}, "arguments": None, "refused": str(error)}
        with quiet():
            program = capture(pipe, make_call(pipe, calls[0]))
    verdict = _verify(program, root, pipeline, calls[0]) if check else None
    return {**summarise(program, pipe, verdict), **found}


def _describe(pipe: Any, variants: Sequence[Found], calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a bundle of it would be."""
    arguments = describe_arguments(pipe, variants, calls)
    return {"parts": describe_parts(variants, pipe), "arguments": arguments, "refused": None}


def _verify(program: Program, root: Path, pipeline: str | None, given: Mapping[str, Any]) -> Verdict:
    pipe = open_with_weights(root, pipeline)
    prompt = given.get("prompt", PROMPT)
    other = with_pictures(pipe, {name: value for name, value in given.items() if name != "prompt"})
    text = OTHER_PROMPT if prompt != OTHER_PROMPT else PROMPT
    calls = [with_other_pictures(make_call(pipe, other, text, seed=1)) for _ in range(2)]
    with quiet():
        return verify(program, pipe, *calls)


def render_all(summary: Mapping[str, Any]) -> str:
    """What is known of a pipeline as text: what it does, what a bundle of it is made of, and what a run may choose."""
    lines = [render(summary)]
    if summary["parts"]:
        lines += ["", *render_parts(summary["parts"])]
    if summary["arguments"]:
        lines += ["", *render_arguments(summary["arguments"], summary["lengths"])]
    if summary["refused"]:
        lines += ["", f"no bundle can be made of it: {summary['refused']}"]
    return "\n".join(lines)
