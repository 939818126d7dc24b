"""From the plan of a captured pipeline to the graphs of its bundle: what its compile and a search have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slipcast.progress import Advance, Stages
from slipcast_compiler.engines.programs import ProgramGraphs, add_program_guard, tabulate_prompts
from slipcast_compiler.export.pipeline import export_pipeline
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.rewrite import NO_REWRITES, Rewrites, digests_of
from slipcast_compiler.passes.apply import needs_profile
from slipcast_compiler.passes.program import RewrittenProgram, rewrite_denoisers
from slipcast_compiler.plan_program import ProgramPlan
from slipcast_compiler.precision.programs import (
    images_needed,
    quantize_denoisers,
    quantize_program_weights,
    record_calls,
)
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.profile.program import make_program_profiles
from slipcast_compiler.schedule.caching import IMAGES
from slipcast_compiler.schedule.program_caching import cache_program_features
from slipcast_compiler.schedule.program_timesteps import choose_program_timesteps

EVERYWHERE = (0.0, 1e9)  # noise levels, all of them


@dataclass(frozen=True)
class MadeProgram:
    """The graphs, and what stages report: `rewritten` by passes, and what was found of `timesteps` and `caching`.
    `inputs`: what record_inputs made, if anything is quantised."""

    graphs: ProgramGraphs
    rewritten: RewrittenProgram
    reports: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    inputs: Path | None = None


def export_program(plan: ProgramPlan, source: str, cache: Cache, stages: Stages) -> MadeProgram:
    """The pipeline's program with its denoisers rewritten, each stage from the cache or made; `source`: the digest of
    the checkpoint's files. CheckFailed where the program is not the pipeline."""
    recipe = plan.recipe

    # What the family asks of the denoisers, and the denoisers rewritten for it.
    profiles = make_profiles(plan, source, cache, stages) if needs_profile(recipe.passes) else {}
    rewritten = rewrite_denoisers(recipe.passes, plan.tasks(source), profiles, cache, stages)

    # The pipeline's own code, recorded for all that is listed, compared with itself on another prompt and seed, and
    # exported.
    with stages.stage("capture and export") as advance:
        entry = _export(plan, source, rewritten.rewrites, cache, advance)
    return MadeProgram(ProgramGraphs(entry, plan.samplings), rewritten)


def _export(plan: ProgramPlan, source: str, rewrites: Rewrites, cache: Cache, advance: Advance) -> Path:
    """The directory of the cache that has the program with these rewrites."""

    def export(folder: Path) -> None:
        arguments = plan.checkpoint.root, plan.recipe.model.pipeline, plan.calls, plan.wanted, rewrites, plan.whole
        run_isolated(export_pipeline, *arguments, folder, advance=advance)

    how = {"rewrites": digests_of(rewrites), "whole": plan.whole, "wanted": asdict(plan.wanted)}
    return cache.get("program", {**plan.given(source), **how}, export)


def add_strangers(plan: ProgramPlan, source: str, graphs: ProgramGraphs, cache: Cache, stages: Stages) -> ProgramGraphs:
    """With what draws prompts out of the family, where the recipe's guard asks for that: the pipeline as it is."""
    if not (plan.recipe.guard and plan.recipe.guard.policy == "fallback"):
        return graphs
    with stages.stage("denoisers of strangers") as advance:
        return graphs.with_strangers(_export(plan, source, NO_REWRITES, cache, advance), cache)


def make_profiles(plan: ProgramPlan, source: str, cache: Cache, stages: Stages) -> Mapping[str, Profile]:
    """By denoiser, what calibration prompts ask of it."""
    with stages.stage("profile") as advance:
        names, given = (plan.recipe.name, plan.checkpoint.name), plan.given(source)
        return make_program_profiles(plan.profiling, given, plan.recipe.profile, names, cache, advance)


def specialise(
    plan: ProgramPlan, exported: MadeProgram, besides: Sequence[Mapping[str, Any]], cache: Cache, stages: Stages
) -> MadeProgram:
    """The graphs of the plan's bundle, each stage from the cache or made; `besides`: by variant, what calls take
    besides a text."""
    recipe, graphs, reports, inputs = plan.recipe, exported.graphs, dict[str, Any](), None

    # How a runtime tells prompts out of the family.
    if recipe.guard:
        with stages.stage("guard") as advance:
            graphs = add_program_guard(graphs, recipe.guard, plan.guarded_prompts, cache, advance)

    # The noise levels to sample at: the pipeline's, the recipe's, or found on the family.
    if finding := recipe.timesteps:
        with stages.stage("timesteps") as advance:
            images = plan.calibration(finding.prompts)
            found = choose_program_timesteps(graphs, images, besides[0], finding, cache, advance)
            graphs, reports["timesteps"] = found

    # All prompts of a closed family are known: a table takes the place of what computes them.
    if plan.closed_prompts:
        with stages.stage("tabulate prompts") as advance:
            graphs = tabulate_prompts(graphs, plan.closed_prompts, cache, advance)

    # Features that change slowly are taken from an earlier step, where a shallow denoiser is enough.
    if features := recipe.caching:
        with stages.stage("cache features") as advance:
            images = plan.calibration(IMAGES)
            split = cache_program_features(graphs, images, besides[0], features, cache, advance)
            graphs, reports["caching"] = split

    # The loop's graphs in INT8, and linear layers in INT4.
    if recipe.samples_needed:
        inputs = record_inputs(plan, graphs, besides, cache, stages)
        if int8 := recipe.quantize_options:
            with stages.stage("quantize denoiser") as advance:
                graphs = quantize_denoisers(graphs, inputs, int8, cache, advance)
        if int4 := recipe.int4_options:
            with stages.stage("quantize weights") as advance:
                graphs = quantize_program_weights(graphs, inputs, int4, cache, advance)
    return replace(exported, graphs=graphs, reports=reports, inputs=inputs)


def record_inputs(
    plan: ProgramPlan, graphs: ProgramGraphs, besides: Sequence[Mapping[str, Any]], cache: Cache, stages: Stages
) -> Path:
    """A directory of evaluations of each component on calibration prompts, as record_calls makes it; along the
    pipeline's own steps where profile.sampling says so, but for a denoiser in two, whose mask is for the bundle's.

    Where some steps have no guidance, images have it in turns, at all of them: each denoiser sees all noise levels.
    """
    samplings, count = graphs.samplings, images_needed(plan.recipe.samples_needed, graphs.record)
    if plan.recipe.profile.sampling == "reference" and not graphs.split:
        samplings = ()
    if any(each.guidance_interval for each in graphs.samplings):
        (loop,) = (variant.loop for variant in graphs.record.every)
        assert loop
        assert loop.guidance
        assert plan.steps.own
        (sampling,) = samplings or (plan.steps.own,)
        samplings = (sampling.model_copy(update={"guidance_interval": EVERYWHERE}),)
        count, besides = 2 * count, [{**each, **own} for each in besides for own in ({}, {loop.guidance: 1.0})]
    with stages.stage("record inputs") as advance:
        images = plan.calibration(count)
        return record_calls(
            replace(graphs, samplings=samplings), images, besides, plan.recipe.samples_needed, cache, advance
        )
