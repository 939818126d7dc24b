"""What a recipe cannot ask of a captured pipeline, told before anything takes time."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slipcast.errors import RecipeError
from slipcast_compiler.capture.cut import Part
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.parts import denoisers_of, reads_of
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.recipe.passes import AdaptersTable
from slipcast_compiler.recipe.recipe import OWN, GuardTable, Recipe

# What a recipe may say of a captured pipeline; every other table belongs to what is not captured yet.
TABLES = frozenset(
    {
        "name", "model", "lora", "call", "family", "sampling", "timesteps", "caching", "adapters", "early_exit",
        "decode", "profile", "passes", "guard", "search", "evaluate", "gate", "targets",
    }
)  # fmt: skip


def check_tables(recipe: Recipe) -> None:
    if others := sorted(recipe.model_fields_set - TABLES):
        raise RecipeError(
            f"[{others[0]}] is not for a captured pipeline yet",
            expected=", ".join(sorted(TABLES)),
            got=", ".join(others),
            hint="what the pipeline is called with goes under [call], by the names of its own arguments",
        )
    if "batch" in recipe.profile.model_fields_set:
        raise RecipeError(
            "profile.batch is not for a captured pipeline, which draws images one by one, as it is called",
            expected="none",
            got=recipe.profile.batch,
        )
    _check_call(recipe.call)


def _check_call(call: Mapping[str, Any]) -> None:
    """RecipeError for arguments that are a run's, or the compile's own."""
    for name, value in call.items():
        if name in OWN:
            raise RecipeError(f"call.{name}: {OWN[name]}", expected="none", got=value)
        if re.fullmatch(r"num_\w+_per_prompt", name) and value != 1:
            raise RecipeError(
                f"call.{name}: a program draws one image; a run draws as many as it is asked for, one by one",
                expected=1,
                got=value,
            )


def check_sources(found: Found, name: str, recipe: Recipe) -> None:
    """RecipeError where what it draws depends on what no family has, or not on what it has."""
    prompted = any(template.argument == "prompt" for template in found.templates.values())
    if prompted != bool(recipe.family):
        raise RecipeError(
            f"what {name} draws depends on {'a prompt' if prompted else 'no prompt'}",
            expected="a [family]" if prompted else "a recipe without [family]",
        )


def check_guarded(table: GuardTable, variants: Sequence[Found], adapters: AdaptersTable | None) -> None:
    """RecipeError where nothing that is evaluated once, in each variant, follows from texts alone; or where strangers
    would be drawn without the adapters that a run sets."""
    if table.policy == "fallback" and adapters:
        raise RecipeError(
            'guard.policy = "fallback" does not go with [adapters]: what draws strangers has no slots',
            expected="warn or refuse", got=table.policy,
            hint="a bundle of the whole pipeline beside this one can draw what it refuses",
        )  # fmt: skip
    texts = {template.argument for found in variants for template in found.templates.values()} - {None, "prompt"}
    if texts:
        raise RecipeError(
            f"[guard] would judge {sorted(map(str, texts))[0]} too, which a run may change",
            expected="prompt alone", got=", ".join(sorted(map(str, texts))),
            hint="leave it out of call, or leave [guard] out",
        )  # fmt: skip
    each = [
        {part.name for part in found.cut.parts if [*reads_of(part)] == ["prompt"] and _gives_embeddings(part)}
        & {name for name, times in Counter(use.part for use in found.cut.uses).items() if times == 1}
        for found in variants
    ]
    if not set.intersection(*each):
        raise RecipeError(
            f"[guard] is not for {variants[0].program.pipeline}: no part of it reads a prompt and nothing else, and is "
            "evaluated once, whatever call lists",
            expected="a recipe without [guard]",
        )


def _gives_embeddings(part: Part) -> bool:
    specs = [part.program.specs[value] for value in part.outputs]
    return any(dtype == torch.float32 and len(shape) > 1 for shape, dtype in specs)


def check_adapters(table: AdaptersTable, variants: Sequence[Found], pipe: Any) -> None:
    """RecipeError where a pattern fits no linear layer of a denoiser."""
    layers = [
        f"{denoiser}.{name}"
        for denoiser in denoisers_of(variants)
        for name, layer in module_of(pipe, denoiser).named_modules()
        if isinstance(layer, nn.Linear)
    ]
    for pattern in table.layers:
        if not fnmatch.filter(layers, pattern):
            raise RecipeError(
                f"adapters.layers: {pattern!r} fits no linear layer of a denoiser",
                expected=f"a pattern such as *.{layers[0].rpartition('.')[2]}" if layers else "a pipeline with some",
                got=f"{len(layers)} layers with other names",
            )
