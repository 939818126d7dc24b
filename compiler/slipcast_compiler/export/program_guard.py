"""What a captured program's bundle needs to tell prompts out of its family: see export/guard.py; of its own values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from slipcast.bundle.manifest import EMBEDDINGS
from slipcast.bundle.program import Program, ProgramCall, Variant
from slipcast.bundle.program_manifest import ProgramGuard, Unspecialised
from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.bundle.records import Component
from slipcast.bundle.sources import PromptSource
from slipcast.bundle.tensorfile import read_header
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast.run.guard import Floats, embed
from slipcast.run.load import load
from slipcast.run.program_guard import PROMPT, by_token, special_tokens
from slipcast.run.program_request import check_program_request
from slipcast.run.residency import InUse
from slipcast.run.values import dependence
from slipcast.run.variants import Ready, read_variants
from slipcast_compiler.export.closed import early_calls, of_texts
from slipcast_compiler.export.guard import DISTANCES, TABLE, choose_threshold, left_out
from slipcast_compiler.export.unspecialised import Strangers
from slipcast_compiler.recipe.recipe import GuardTable

LOOKED_AT = "looked-at.json"
AT_ONCE = 16  # prompts, of which all that leads to the value is in memory


def embed_prompts(root: Path, target: str, prompts: tuple[str, ...], out: Path, advance: Advance) -> None:
    """Write the embeddings of these prompts, float32 [prompts, width], each one's distance to the others, and what they
    are averages of. `root`: of a bundle in fp32. Runs in a process of its own.

    RecipeError where nothing that is computed of a prompt alone tells one from another.
    """
    bundle = open_any_bundle(root)
    assert isinstance(bundle, ProgramBundle)
    program, ready = bundle.manifest.program, read_variants(bundle)[0]
    values = values_of_prompts(program, bundle.manifest.components)
    found: list[list[Floats]] = [[] for _ in values]
    with load(root, target=target, residency="sequential") as pipe, InUse(pipe.residency) as engines:
        for begin in range(0, len(prompts), AT_ONCE):
            some = prompts[begin : begin + AT_ONCE]
            advance(begin, len(prompts))
            for value, embeddings in zip(values, found, strict=True):
                embeddings += _embed(ready, program, value, some, engines)
    for value, embeddings in zip(values, found, strict=True):
        if len({each.shape for each in embeddings}) == 1:
            together = np.stack(embeddings)
            if np.isfinite(together).all() and len(np.unique(together, axis=0)) > 1:
                save_file({EMBEDDINGS: together}, out / TABLE)
                (out / DISTANCES).write_text(json.dumps(left_out(together)))
                (out / LOOKED_AT).write_text(json.dumps(value))
                return
    raise _not_for(program)


def _embed(
    ready: Ready, program: Program, value: Mapping[str, str | None], prompts: tuple[str, ...], engines: InUse
) -> list[Floats]:
    request = check_program_request(
        program, {PROMPT: list(prompts)}, seed=0, num_images_per_prompt=1, output_type="np", on_long_prompt="warn"
    )
    made = of_texts(ready, request.texts, engines, lambda done, total: None, value["component"])
    call = next(call for call in ready.variant.calls if call.component == value["component"])
    words, given = call.inputs.get(value["words"] or ""), call.outputs[str(value["output"])]
    special, embeddings = special_tokens(ready, words), []
    for image in range(len(prompts)):
        ids, hidden = by_token(made.get(given, image), made.get(words, image) if words else None)
        embeddings.append(embed(ids[None], hidden[None], special)[0])
    return embeddings


def values_of_prompts(program: Program, components: Mapping[str, Component]) -> list[dict[str, str | None]]:
    """What components give of a prompt alone, once in each variant: of the first component that gives any, outputs with
    an embedding of each token before those of the whole text, with the ids of as many tokens. RecipeError where there
    are none."""
    first, *others = (_once(variant) for variant in program.every)
    depends, sources = dependence(program), {each.value: each for each in program.sources}
    for component, call in first.items():
        found: list[tuple[bool, dict[str, str | None]]] = []
        ids = {}
        for spec in components[component].inputs:
            source = sources.get(call.inputs.get(spec.name, ""))
            if isinstance(source, PromptSource) and (source.argument, source.field) == (PROMPT, "input_ids"):
                ids[spec.name] = spec.shape[1]
        for spec in components[component].outputs:
            fits = spec.dtype == "float32" and len(spec.shape) > 1 and depends[call.outputs[spec.name]] == {PROMPT}
            if not fits or not all(component in each for each in others):
                continue
            words = next((name for name, length in ids.items() if length == spec.shape[-2]), None)
            if words is None and len(ids) == 1:  # an instruction before the prompt was cut away
                words = next(iter(ids))
            text = len(spec.shape) == 2
            value = {"component": component, "output": spec.name, "words": None if text else words}
            found.append((text, value))
        if found:
            return [value for _, value in sorted(found, key=lambda each: each[0])]
    raise _not_for(program)


def _not_for(program: Program) -> RecipeError:
    return RecipeError(
        f"[guard] is not for {program.pipeline}: nothing that it computes of a prompt alone tells one from another",
        expected="a recipe without [guard]",
    )


def _once(variant: Variant) -> dict[str, ProgramCall]:
    calls = [call.component for call in variant.calls]
    return {call.component: call for call in early_calls(variant) if calls.count(call.component) == 1}


def write_program_guard(table: GuardTable, made: Path, strangers: Strangers | None, folder: Path) -> ProgramGuard:
    """Put the table of embeddings into the bundle at `folder`; returns the manifest's record. `strangers`: what draws
    them, by the policy fallback; without, as while nothing but the family is drawn yet, they are warned of."""
    draws = None
    if strangers:
        draws = Unspecialised(components=dict(strangers.components), samplings=strangers.samplings)
    shutil.copyfile(made / TABLE, folder / TABLE)
    prompts, width = read_header(made / TABLE)[EMBEDDINGS].shape
    return ProgramGuard(
        **json.loads((made / LOOKED_AT).read_text()),
        policy=table.policy if draws or table.policy != "fallback" else "warn",
        fallback=draws,
        table=TABLE,
        shape=(prompts, width),
        threshold=choose_threshold(json.loads((made / DISTANCES).read_text()), table.false_alarms),
        false_alarms=table.false_alarms,
    )
