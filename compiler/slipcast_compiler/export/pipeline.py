"""From a checkpoint to an exported program: captured, compared with the pipeline itself, and exported."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slipcast.errors import ArtifactError, CheckFailed
from slipcast.progress import Advance
from slipcast_compiler.capture.call import make_call, with_other_pictures
from slipcast_compiler.capture.find import Found, Wanted, find_each
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.loop import GUIDANCE
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.replay import modules_of
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.capture.texts import SHORT, with_others
from slipcast_compiler.capture.verify import LIMIT, compare_given, verify
from slipcast_compiler.export.batched import NO_BATCHES, parts_in_batches
from slipcast_compiler.export.early import leave_loop
from slipcast_compiler.export.program import export_program
from slipcast_compiler.export.standin import open_at_random
from slipcast_compiler.export.streamed import open_streamed
from slipcast_compiler.export.tiles import share_statistics
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.rewrite import Rewrites, load

VERIFIED = "verified.json"


def export_pipeline(
    root: Path, pipeline: str | None, calls: Sequence[Mapping[str, Any]], wanted: Wanted, rewrites: Rewrites,
    whole: bool, folder: Path, advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    """Capture each of the calls, verify and export into `folder`; runs in a process of its own. `wanted`: what
    else is captured. `rewrites`: what passes changed of the pipeline, which is captured as they left it. `whole`:
    programs are verified with all weights in memory; else with random ones that take little, and with functions in
    place of modules, see stand_ins.

    CheckFailed where a program is not the pipeline; ArtifactError for a weight that is missing, or no number.
    """
    streamed = open_streamed(root, pipeline, rewrites)
    calls = [with_pictures(streamed.pipe, given) for given in calls]
    variants = find_each(streamed.pipe, calls, wanted)
    pipe = _open_whole(root, pipeline, rewrites) if whole else open_at_random(root, pipeline, rewrites)
    with quiet():  # of prompts that are ours
        error = _verify(variants, pipe, calls, not whole)
    # With random weights that share their memory a denoiser takes as long as any: it is not run for this alone.
    batches = parts_in_batches(variants, modules_of(pipe)) if whole else NO_BATCHES
    del pipe
    gc.collect()  # of what was loaded, much refers to itself
    export_program(variants, streamed.pipe, folder, advance, streamed.weights, batches)
    leave_loop(folder)
    share_statistics(folder)
    (folder / VERIFIED).write_text(json.dumps({"error": error, "weights": "checkpoint" if whole else "functions"}))
    return {}


def _open_whole(root: Path, pipeline: str | None, rewrites: Rewrites) -> Any:
    """The pipeline with all weights, those in their places that passes changed."""
    pipe = open_with_weights(root, pipeline)
    for name, rewrite in rewrites.items():
        load(module_of(pipe, name), rewrite.weights())
    _check_weights(pipe, root)
    return pipe


def _verify(variants: Sequence[Found], pipe: Any, calls: Sequence[Mapping[str, Any]], light: bool) -> float:
    """The error of the worst, for any prompt."""
    errors = []
    for found, given in zip(variants, calls, strict=True):
        errors += [_verified(found.program, pipe, given, prompt, light) for prompt in found.prompts]
        if found.loop and (plain := found.loop.unguided):
            without = {**given, GUIDANCE: 1.0}
            for prompt in found.prompts:
                errors.append(_verified(plain.program, pipe, without, prompt, light))
                calls_of_both = (_other_call(pipe, each, prompt) for each in (given, without))
                errors.append(compare_given(found.program, plain, pipe, *calls_of_both, light=light))
    if max(errors) > LIMIT:
        raise CheckFailed(
            "without guidance, the model is given something else for another prompt, seed and picture",
            expected=f"a relative error of {LIMIT:g}",
            got=f"{max(errors)}",
            hint='leave sampling.guidance_interval out, or "guidance_interval" of search.levers',
        )
    return max(errors)


def _other_call(pipe: Any, given: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """With a seed, other texts and pictures that were not captured."""
    call = with_other_pictures(make_call(pipe, given, prompt, seed=1))
    return with_others(call, lambda text: f"{text} {SHORT}")


def _verified(program: Program, pipe: Any, given: Mapping[str, Any], prompt: str, light: bool) -> float:
    """The program's error for a prompt, and for other texts and pictures where there are any; CheckFailed where it is
    another pipeline then."""
    verdict = verify(program, pipe, *(_other_call(pipe, given, prompt) for _ in range(2)), light=light)
    if verdict.error is not None and math.isnan(verdict.error):
        raise ArtifactError(
            f"{program.pipeline} gives NaN or infinity, so that nothing can be compared with it",
            expected="numbers",
            got=f"none, from {verdict.difference} on",
        )
    if verdict.error is None or not verdict.holds:
        raise CheckFailed(
            f"{program.pipeline}: what was captured is not the pipeline for another prompt, seed and picture",
            expected=f"a relative error of {LIMIT:g}",
            got=f"{verdict.error}; the first to differ is {verdict.difference}",
            hint="`slipcast capture --verify` shows what the pipeline reads into Python",
        )
    return verdict.error


def _check_weights(pipe: Any, root: Path) -> None:
    for name, component in pipe.components.items():
        for path, weight in component.named_parameters() if isinstance(component, nn.Module) else ():
            if not weight.isfinite().all():
                raise ArtifactError(f"{root}: {name}.{path} is not finite", expected="numbers", got="NaN or infinity")
