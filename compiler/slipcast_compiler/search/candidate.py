"""From a point to something that runs: the recipe with its overrides, and engines for the target that is measured.

Stages are those of compile.py, in its order, and their results are in the same cache: what is chosen is not made again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slipcast.bundle.validation import dotted, problems
from slipcast.errors import RecipeError
from slipcast.progress import Advance, Stages
from slipcast_compiler.engines import build_target, exported_sources, package
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.export.component import cached_export
from slipcast_compiler.export.parts import cached_parts
from slipcast_compiler.export.prompts import cached_prompts
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.rewrite import Rewrite
from slipcast_compiler.passes.apply import apply_passes, needs_profile
from slipcast_compiler.plan import Plan, replan
from slipcast_compiler.precision.calibration import calibration_samples
from slipcast_compiler.precision.quantize import quantize
from slipcast_compiler.profile.profile import make_profile
from slipcast_compiler.recipe.reading import put
from slipcast_compiler.recipe.recipe import CutTable, Recipe
from slipcast_compiler.schedule.caching import cache_features, cut_for_caching
from slipcast_compiler.schedule.timesteps import choose_timesteps
from slipcast_compiler.search.levers import measured_target
from slipcast_compiler.search.measuring import Variant


@dataclass(frozen=True)
class Engine:
    """Engines of all components in a bundle's folder; `stages`: see Variant; `target`: its id. `exported`: the graphs
    that they were made of, before the denoiser was cut for caching; `prompts`: a closed family's table."""

    folder: Path
    rewrite: Rewrite
    stages: Path | None
    target: str
    exported: dict[str, Path]
    prompts: Path | None


class Silent(Stages):
    """Stages of a trial, of which there are too many to tell."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Shows nothing."""
        yield silent


def silent(done: int, total: int) -> None:
    """Progress that nobody sees."""


def apply(plan: Plan, overrides: Mapping[str, Any]) -> Plan:
    """The plan of the recipe with these overrides and without [search]; RecipeError where they contradict."""
    document = plan.recipe.model_dump(mode="json", exclude_none=True)
    document.pop("search", None)
    for key, value in overrides.items():
        put(document, key, value, "a trial")
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        found = "; ".join(f"{dotted(where)}: {what}" for where, what in problems(error, Recipe))
        raise RecipeError(f"the trial contradicts itself: {found}") from None
    return replan(plan, recipe)


def engine_key(plan: Plan) -> str:
    """What decides its engines; plans that differ in the rest share them."""
    recipe = plan.recipe
    decides = {
        "passes": recipe.passes.model_dump(mode="json"),
        "caching": recipe.caching and recipe.caching.share,
        "target": recipe.targets[measured_target(plan)].model_dump(mode="json"),
        "measuring": plan.measuring.model_dump(mode="json"),  # what profiles and calibration are taken from
    }
    return json.dumps(decides, sort_keys=True)


def make_engine(plan: Plan, cache: Cache, folder: Path) -> Engine:
    """Engines for the plan's measured target, in `folder`, which is new: a bundle of its own, with its sampling. With
    [caching] all its steps are full. In half precision all of it is cast: what has to stay in fp32 is left for the
    compile to find, and its gate to judge."""
    profile = make_profile(plan, cache, silent) if needs_profile(plan) else None
    rewritten = apply_passes(plan, profile, cache, Silent())
    exported = {
        name: cached_export(plan, name, cache, rewritten.rewrite) for name in plan.checkpoint.architecture.components
    }
    if plan.recipe.cut:
        exported |= cached_parts(exported["denoiser"], CutTable(general=True), cache)
    prompts = cached_prompts(plan, exported, cache, silent) if plan.closed_prompts else None
    exported = {name: source for name, source in exported.items() if name not in plan.not_shipped}
    quantized = None
    table = plan.recipe.targets[measured_target(plan)]
    if table.precision == "int8" and (options := plan.recipe.passes.quantize):
        samples = calibration_samples(plan, exported, prompts, options.samples, cache, silent)
        quantized = quantize(plan, exported["denoiser"], samples, cache, silent)
    folder.mkdir()
    parts, caching = cut_for_caching(plan, exported, cache) if plan.recipe.caching else (exported, None)
    sources, check = exported_sources(parts, quantized), quantized.check if quantized else None
    target = build_target(table, sources, plan.image, Pool(folder), cache, silent, check)
    fields = package.describe(plan, parts, prompts, folder, exported["denoiser"], caching)
    publish.write_manifest(folder, {**fields, "targets": (target,)})
    stages = exported["denoiser"] if plan.recipe.cut else None
    return Engine(folder, rewritten.rewrite, stages, target.id, exported, prompts)


def variant_of(plan: Plan, engine: Engine, cache: Cache) -> Variant:
    """How the plan samples with its engine, with a list of noise levels, and of steps that are shallow, that are found
    first where it asks for them."""
    if plan.recipe.timesteps:
        plan, _ = choose_timesteps(plan, engine.rewrite, cache, silent)
    caching = None
    if plan.recipe.caching:
        caching = cache_features(plan, engine.exported, engine.prompts, cache, silent).record
    return Variant(engine.folder, plan.sampling, engine.stages, caching)
