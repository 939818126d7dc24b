"""The whole compile, in order. Each stage is a call; what a stage does is in the module it calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import Manifest
from slipcast.errors import CheckFailed
from slipcast.progress import Stages
from slipcast_compiler.engines import build_targets, package
from slipcast_compiler.export.component import cached_export
from slipcast_compiler.export.guard import cached_guard, count_alarms, fallbacks, write_guard
from slipcast_compiler.export.parts import cached_parts, read_figures
from slipcast_compiler.export.prompts import cached_prompts
from slipcast_compiler.graph.cost import cost
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge import evaluate
from slipcast_compiler.judge.judging import judge_targets
from slipcast_compiler.pages import report
from slipcast_compiler.passes.apply import apply_passes, needs_profile
from slipcast_compiler.plan import Plan
from slipcast_compiler.precision.calibration import calibration_samples
from slipcast_compiler.precision.casts import measure_casts
from slipcast_compiler.precision.quantize import quantize
from slipcast_compiler.profile.profile import make_profile
from slipcast_compiler.schedule.caching import cache_features
from slipcast_compiler.schedule.early_exit import choose_exits
from slipcast_compiler.schedule.timesteps import choose_timesteps
from slipcast_compiler.search.run import choose_by_search


@dataclass(frozen=True)
class Compiled:
    """The published bundle, and what report.json holds."""

    output: Path
    manifest: Manifest
    record: dict[str, Any]


def compile_plan(plan: Plan, output: Path, cache: Cache, stages: Stages) -> Compiled:
    """Make the bundle at `output`. Raises CheckFailed, with the report written beside it, where the gate is missed."""
    # The point of the recipe's space that is best within the gate, on calibration prompts.
    searched = None
    if plan.recipe.search:
        plan, searched = choose_by_search(plan, cache, stages)

    # The original: the pictures to compare with, and the noise floors below which no difference means anything.
    with stages.stage("originals") as advance:
        originals = evaluate.run_originals(plan, cache, advance)

    # What the family asks of the denoiser, and the denoiser rewritten for it.
    profile = None
    if needs_profile(plan):
        with stages.stage("profile") as advance:
            profile = make_profile(plan, cache, advance)
    rewritten = apply_passes(plan, profile, cache, stages)

    # The noise levels to sample at: the recipe's, or found on the family.
    timesteps = None
    if plan.recipe.timesteps:
        with stages.stage("timesteps") as advance:
            plan, timesteps = choose_timesteps(plan, rewritten.rewrite, cache, advance)

    # Every component as an ONNX graph, without ever holding its weights.
    exported = {}
    for name in plan.checkpoint.architecture.components:
        with stages.stage(f"export {name}"):
            exported[name] = cached_export(plan, name, cache, rewritten.rewrite)

    # What does not depend on the latent leaves the sampling loop.
    if plan.recipe.cut:
        with stages.stage("stage denoiser"):
            exported |= cached_parts(exported["denoiser"], plan.recipe.cut, cache)

    # All prompts of a closed family are known: a table takes the place of the text encoders.
    prompts = None
    if plan.closed_prompts:
        with stages.stage("tabulate prompts") as advance:
            prompts = cached_prompts(plan, exported, cache, advance)
        exported = {name: source for name, source in exported.items() if name not in plan.not_shipped}

    # Features that change slowly are taken from an earlier step, where a shallow denoiser is enough.
    staged, cached = exported["denoiser"], None
    if plan.recipe.caching:
        with stages.stage("cache features") as advance:
            cached = cache_features(plan, exported, prompts, cache, advance)
            exported |= cached.exported

    # The denoiser in INT8, for the targets that ask for it: one graph, which every engine reads.
    quantized = None
    if options := plan.recipe.passes.quantize:
        with stages.stage("calibrate") as advance:
            samples = calibration_samples(plan, exported, prompts, options.samples, cache, advance)
        with stages.stage("quantize denoiser") as advance:
            quantized = quantize(plan, exported["denoiser"], samples, cache, advance)

    # How a runtime tells prompts out of the family, and what draws those.
    guard = None
    if plan.recipe.guard:
        with stages.stage("guard") as advance:
            guard = cached_guard(plan, exported, cache, advance)
            exported |= fallbacks(plan, cache)

    # What half precision would spoil, in any component, stays in fp32.
    caching = cached.record if cached else None
    casts = measure_casts(plan, exported, quantized, prompts, staged, caching, guard, cache, stages)

    # Engines for every target: a bundle that is complete but for the evidence.
    with publish.workspace(output) as folder:
        targets = build_targets(
            plan.recipe.targets, exported, plan.image, folder, cache, stages, quantized, casts.found
        )
        fields = package.describe(plan, exported, prompts, folder, staged, caching) | rewritten.manifest_fields()
        fields |= write_guard(plan, guard, folder, fields["requires"]) if guard else {}
        publish.write_manifest(folder, {**fields, "targets": tuple(targets)})
        casts.check(folder, targets, stages)

        # How little an image has to change, from one step to the next, to be taken for finished.
        exits = None
        if plan.recipe.early_exit:
            targets, exits = choose_exits(plan, folder, targets, cache, stages)
            if any(target.early_exit for target in targets):
                fields["requires"] = (*fields["requires"], "early_exit")
            publish.write_manifest(folder, {**fields, "targets": tuple(targets)})

        # The bundle against the original: what can run here.
        judged = judge_targets(plan, folder, targets, originals, stages)
        fields |= judged.fields

        # The report is written in any case; the bundle is published only if the gate holds.
        record = report.make_record(plan, fields, judged, stages.seconds) | {
            "passes": {**rewritten.reports, **({"quantize": quantized.report} if quantized else {})},
            "mixed_precision": casts.found, "search": searched, "timesteps": timesteps, "early_exit": exits,
            "cut": read_figures(staged), "caching": cached and cached.report,
            "guard": count_alarms(plan, fields.get("guard"), judged.runs),
            "cost": cost(exported["denoiser"] / "denoiser.onnx"),
        }  # fmt: skip
        report.write(folder, record, originals, judged.runs, profile)
        if misses := evaluate.missed(judged.gates):
            kept = report.keep(folder, output) / "report.html"
            raise CheckFailed(
                "the gate was missed; nothing was published:\n  " + "\n  ".join(misses),
                hint=f"look at {kept}, then change the recipe's targets, sampling or limits",
            )
        with stages.stage("publish"):
            manifest = publish.write_manifest(folder, fields)
            publish.publish(folder, output)
    return Compiled(output, manifest, record)
