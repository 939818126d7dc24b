"""From a model's directory to what its pipeline does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slipcast.errors import HostError
from slipcast_compiler.capture.call import PROMPT, make_call
from slipcast_compiler.capture.open import find_pipeline, open_without_weights
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.summary import summarise
from slipcast_compiler.capture.verify import Verdict, verify
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.recipe.reading import parse_override

OTHER_PROMPT = "two large things and some words more"  # of another length


def capture_model(root: Path, pipeline: str | None, overrides: Sequence[str], check: bool) -> dict[str, Any]:
    """Capture the pipeline of a directory, from its configs alone; with `check`, verify it with its weights."""
    given: dict[str, Any] = {}
    for override in overrides:
        parse_override(given, override)
    pipe = open_without_weights(root, pipeline)
    with quiet():
        program = capture(pipe, make_call(pipe, given))
    verdict = _verify(program, root, pipeline, given) if check else None
    return summarise(program, pipe, verdict)


def _verify(program: Program, root: Path, pipeline: str | None, given: dict[str, Any]) -> Verdict:
    kind = find_pipeline(pipeline or program.pipeline)
    try:
        with quiet():
            pipe = kind.from_pretrained(root, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except Exception as error:
        raise HostError(f"{root}: its weights cannot be loaded, so that nothing can be verified", got=error) from error
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    prompt = given.get("prompt", PROMPT)
    other = {name: value for name, value in given.items() if name != "prompt"}
    calls = [make_call(pipe, other, OTHER_PROMPT if prompt != OTHER_PROMPT else PROMPT, seed=1) for _ in range(2)]
    with quiet():
        return verify(program, pipe, *calls)
