"""From a plan to the graphs that a bundle is built from: what the compile and a search have in common."""

from __future__ import annotations

from slipcast.progress import Stages
from slipcast_compiler.export.component import export_component
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.export.guard import add_guard
from slipcast_compiler.export.parts import cut_denoiser
from slipcast_compiler.export.prompts import tabulate_prompts
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.rewrite import Rewrite
from slipcast_compiler.passes.apply import apply_passes, needs_profile
from slipcast_compiler.plan import Plan
from slipcast_compiler.precision.calibration import calibration_samples
from slipcast_compiler.precision.int4 import quantize_all_weights
from slipcast_compiler.precision.quantize import quantize
from slipcast_compiler.profile.profile import make_profile
from slipcast_compiler.schedule.caching import cache_features
from slipcast_compiler.schedule.timesteps import choose_timesteps


def make_graphs(plan: Plan, cache: Cache, stages: Stages) -> Graphs:
    """The graphs of the plan's bundle, each stage from the cache or made."""
    recipe = plan.recipe

    # What the family asks of the denoiser, and the denoiser rewritten for it.
    profile = None
    if needs_profile(recipe.passes):
        with stages.stage("profile") as advance:
            profile = make_profile(plan.task.calibration, recipe.profile, recipe.name, cache, advance)
    rewritten = apply_passes(recipe.passes, plan.task, profile, cache, stages)

    # Every component as an ONNX graph, without ever holding its weights.
    graphs = export_all(plan, rewritten.rewrite, cache, stages)
    graphs = graphs.add(
        fields=rewritten.manifest_fields(), report=rewritten.reports, profile=profile.folder if profile else None
    )

    # The noise levels to sample at: the recipe's, or found on the family.
    if table := recipe.timesteps:
        with stages.stage("timesteps") as advance:
            drawing = plan.drawing(table.prompts)
            sampling, found = choose_timesteps(drawing, table, rewritten.rewrite, cache, advance)
            graphs = graphs.add(sampling=sampling, report={"timesteps": found})

    # What does not depend on the latent leaves the sampling loop.
    if recipe.cut:
        with stages.stage("cut denoiser"):
            graphs = cut_denoiser(graphs, recipe.cut.general, cache)

    # All prompts of a closed family are known: a table takes the place of the text encoders.
    if plan.closed_prompts:
        with stages.stage("tabulate prompts") as advance:
            graphs = tabulate_prompts(graphs, plan.closed_prompts, cache, advance)

    # Features that change slowly are taken from an earlier step, where a shallow denoiser is enough.
    if recipe.caching:
        with stages.stage("cache features") as advance:
            graphs = cache_features(graphs, recipe.caching, cache, advance)

    # The denoiser in INT8, and linear layers in INT4, for the targets that ask for it: one graph, which every engine
    # reads.
    if count := recipe.samples_needed:
        all_are_read = recipe.int4_options or any(table.half for table in recipe.targets)
        components = tuple(graphs.components) if all_are_read else ("denoiser",)
        with stages.stage("calibrate") as advance:
            samples = calibration_samples(graphs, plan.measuring, components, count, cache, advance)
        if int8 := recipe.quantize_options:
            with stages.stage("quantize denoiser") as advance:
                graphs = quantize(graphs, samples, int8, cache, advance)
        if int4 := recipe.int4_options:
            with stages.stage("quantize weights") as advance:
                graphs = quantize_all_weights(graphs, samples, int4, cache, advance)

    # How a runtime tells prompts out of the family, and what draws those.
    if recipe.guard:
        with stages.stage("guard") as advance:
            graphs = add_guard(graphs, recipe.guard, plan.guarded_prompts, cache, advance)
    return graphs


def export_all(plan: Plan, rewrite: Rewrite, cache: Cache, stages: Stages) -> Graphs:
    """Every component of the checkpoint, exported."""
    components = {}
    for name in plan.checkpoint.architecture.components:
        with stages.stage(f"export {name}"):
            components[name] = export_component(plan.original, name, cache, rewrite)
    return Graphs(plan.recipe.name, plan.original, plan.family, plan.sampling, plan.reference, components)
