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
from slipcast.bundle.program_manifest import ProgramGuard
from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.bundle.records import Component
from slipcast.bundle.sources import PromptSource
from slipcast.bundle.tensorfile import read_header
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast.run.guard import embed
from slipcast.run.load import load
from slipcast.run.program_guard import PROMPT, by_token, special_tokens
from slipcast.run.program_request import check_program_request
from slipcast.run.residency import InUse
from slipcast.run.values import dependence
from slipcast.run.variants import read_variants
from slipcast_compiler.export.closed import early_calls, of_texts
from slipcast_compiler.export.guard import DISTANCES, TABLE, choose_threshold, left_out
from slipcast_compiler.recipe.recipe import GuardTable

LOOKED_AT = "looked-at.json"


def embed_prompts(root: Path, target: str, prompts: tuple[str, ...], out: Path, advance: Advance) -> None:
    """Write the embeddings of these prompts, float32 [prompts, width], each one's distance to the others, and what they
    are averages of. `root`: of a bundle in fp32. Runs in a process of its own."""
    bundle = open_any_bundle(root)
    assert isinstance(bundle, ProgramBundle)
    program, ready = bundle.manifest.program, read_variants(bundle)[0]
    chosen = choose_value(program, bundle.manifest.components)
    request = check_program_request(
        program, {PROMPT: list(prompts)}, seed=0, num_images_per_prompt=1, output_type="np", on_long_prompt="warn"
    )
    with load(root, target=target, residency="sequential") as pipe, InUse(pipe.residency) as engines:
        values = of_texts(ready, request.texts, engines, advance)
    call = next(call for call in ready.variant.calls if call.component == chosen["component"])
    words, value = call.inputs.get(chosen["words"] or ""), call.outputs[str(chosen["output"])]
    special, embeddings = special_tokens(ready, words), []
    for image in range(len(prompts)):
        ids, hidden = by_token(values.get(value, image), values.get(words, image) if words else None)
        embeddings.append(embed(ids[None], hidden[None], special)[0])
    together = np.stack(embeddings)
    save_file({EMBEDDINGS: together}, out / TABLE)
    (out / DISTANCES).write_text(json.dumps(left_out(together)))
    (out / LOOKED_AT).write_text(json.dumps(chosen))


def choose_value(program: Program, components: Mapping[str, Component]) -> dict[str, str | None]:
    """Of what components give of texts alone, once in each variant, the first that has an embedding of each token, else
    the first of the whole text; RecipeError where there is none."""
    found = dict[bool, dict[str, str | None]]()
    first, *others = (_once(variant) for variant in program.every)
    depends = dependence(program)
    for component, call in first.items():
        specs = {spec.name: spec for spec in components[component].outputs}
        for name, value in call.outputs.items():
            tokens = len(specs[name].shape) > 2
            fits = specs[name].dtype == "float32" and len(specs[name].shape) > 1 and PROMPT in depends[value]
            if fits and tokens not in found and all(component in each for each in others):
                ids = {
                    each.value for each in program.sources
                    if isinstance(each, PromptSource) and each.argument == PROMPT and each.field == "input_ids"
                }  # fmt: skip
                words = next((name for name, value in call.inputs.items() if value in ids), None)
                found[tokens] = {"component": component, "output": name, "words": words if tokens else None}
    if not found:
        raise RecipeError(
            f"[guard] is not for {program.pipeline}: nothing of what it computes depends on a prompt alone",
            expected="a recipe without [guard]",
        )
    return found.get(True) or found[False]


def _once(variant: Variant) -> dict[str, ProgramCall]:
    calls = [call.component for call in variant.calls]
    return {call.component: call for call in early_calls(variant) if calls.count(call.component) == 1}


def write_program_guard(table: GuardTable, made: Path, folder: Path) -> ProgramGuard:
    """Put the table of embeddings into the bundle at `folder`; returns the manifest's record."""
    shutil.copyfile(made / TABLE, folder / TABLE)
    prompts, width = read_header(made / TABLE)[EMBEDDINGS].shape
    return ProgramGuard(
        **json.loads((made / LOOKED_AT).read_text()),
        policy="refuse" if table.policy == "refuse" else "warn",
        table=TABLE,
        shape=(prompts, width),
        threshold=choose_threshold(json.loads((made / DISTANCES).read_text()), table.false_alarms),
        false_alarms=table.false_alarms,
    )
