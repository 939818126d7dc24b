"""From a model's directory to what its pipeline does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.call import PROMPT, make_call
from slipcast_compiler.capture.open import open_with_weights, open_without_weights
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.summary import summarise
from slipcast_compiler.capture.texts import OTHER_PROMPT
from slipcast_compiler.capture.verify import Verdict, verify
from slipcast_compiler.host.quiet import quiet
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
    pipe = open_without_weights(root, pipeline)
    with quiet():
        program = capture(pipe, make_call(pipe, given))
    verdict = _verify(program, root, pipeline, given) if check else None
    return summarise(program, pipe, verdict)


def _verify(program: Program, root: Path, pipeline: str | None, given: dict[str, Any]) -> Verdict:
    pipe = open_with_weights(root, pipeline)
    prompt = given.get("prompt", PROMPT)
    other = {name: value for name, value in given.items() if name != "prompt"}
    calls = [make_call(pipe, other, OTHER_PROMPT if prompt != OTHER_PROMPT else PROMPT, seed=1) for _ in range(2)]
    with quiet():
        return verify(program, pipe, *calls)
