"""The compile of a captured pipeline, in order. Each stage is a call, as in compile.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from slipcast.errors import CheckFailed
from slipcast.progress import Stages
from slipcast_compiler.compile import Compiled
from slipcast_compiler.engines.contents import family_record
from slipcast_compiler.engines.programs import ProgramGraphs, add_program_guard, tabulate_prompts, write_bundle
from slipcast_compiler.export.pipeline import VERIFIED, export_pipeline
from slipcast_compiler.export.program import PARTS
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import wait_without_spinning
from slipcast_compiler.judge.captured import draw_originals
from slipcast_compiler.judge.elsewhere import load_originals
from slipcast_compiler.judge.gate import missed
from slipcast_compiler.judge.judges import open_judges
from slipcast_compiler.judge.programs import arguments_of, judge_program
from slipcast_compiler.model.digests import digest
from slipcast_compiler.model.rewrite import digests_of
from slipcast_compiler.pages.evidence import keep
from slipcast_compiler.pages.program import ProgramEvidence, make_program_record, write_program_report
from slipcast_compiler.passes.apply import needs_profile
from slipcast_compiler.passes.program import rewrite_denoisers
from slipcast_compiler.plan_program import ProgramPlan
from slipcast_compiler.precision.programs import (
    images_needed,
    measure_program_casts,
    quantize_denoisers,
    quantize_program_weights,
    record_calls,
)
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.profile.program import make_program_profiles
from slipcast_compiler.schedule.caching import IMAGES
from slipcast_compiler.schedule.early_exit import Measuring, choose_exits
from slipcast_compiler.schedule.program_caching import cache_program_features
from slipcast_compiler.schedule.program_timesteps import choose_program_timesteps


def compile_program(plan: ProgramPlan, output: Path, cache: Cache, stages: Stages) -> Compiled:
    """Make the bundle at `output`. Raises CheckFailed where the program is not the pipeline, or, with the report
    written beside it, where the gate is missed."""
    wait_without_spinning()
    recipe = plan.recipe

    checkpoint, pipeline = plan.checkpoint.root, recipe.model.pipeline
    source = digest(checkpoint, pipeline)
    given = plan.given(source)

    # What a larger machine drew of held-out prompts, and of those out of the family.
    originals = None
    if plan.drawn:
        originals = load_originals(plan.folder / str(recipe.evaluate.originals), plan.asked, plan.drawn)

    # What the family asks of the denoisers, and the denoisers rewritten for it.
    profiles = dict[str, Profile]()
    if needs_profile(recipe.passes):
        with stages.stage("profile") as advance:
            names = recipe.name, plan.checkpoint.name
            profiles = make_program_profiles(plan.profiling, given, recipe.profile, names, cache, advance)
    rewritten = rewrite_denoisers(recipe.passes, plan.tasks(source), profiles, cache, stages)

    # The pipeline's own code, recorded for all that is listed, compared with itself on another prompt and seed, and
    # exported.
    with stages.stage("capture and export") as advance:
        rewrites = rewritten.rewrites

        def export(folder: Path) -> None:
            arguments = checkpoint, pipeline, plan.calls, rewrites, plan.whole, folder
            run_isolated(export_pipeline, *arguments, advance=advance)

        entry = cache.get("program", {**given, "rewrites": digests_of(rewrites), "whole": plan.whole}, export)

    # Else the pipeline itself draws them here.
    if not originals:
        with stages.stage("originals") as advance:
            drawings = plan.asked.drawing(plan.precision), plan.asked.outside(plan.precision)
            originals = draw_originals(*drawings, given, cache, advance)

    graphs = ProgramGraphs(entry, plan.samplings)
    besides, timesteps = arguments_of(graphs.record, originals), None

    # How a runtime tells prompts out of the family.
    if recipe.guard:
        with stages.stage("guard") as advance:
            graphs = add_program_guard(graphs, recipe.guard, plan.guarded_prompts, cache, advance)

    # The noise levels to sample at: the pipeline's, the recipe's, or found on the family.
    if finding := recipe.timesteps:
        with stages.stage("timesteps") as advance:
            images = plan.calibration(finding.prompts)
            graphs, timesteps = choose_program_timesteps(graphs, images, besides[0], finding, cache, advance)

    # All prompts of a closed family are known: a table takes the place of what computes them.
    if plan.closed_prompts:
        with stages.stage("tabulate prompts") as advance:
            graphs = tabulate_prompts(graphs, plan.closed_prompts, cache, advance)

    # Features that change slowly are taken from an earlier step, where a shallow denoiser is enough.
    caching = None
    if features := recipe.caching:
        with stages.stage("cache features") as advance:
            images = plan.calibration(IMAGES)
            graphs, caching = cache_program_features(graphs, images, besides[0], features, cache, advance)

    # The loop's graphs in INT8, linear layers in INT4, and what half precision would spoil in any: measured on
    # calibration prompts.
    casts, samples = None, recipe.samples_needed
    if samples or any(table.half for table in recipe.targets):
        with stages.stage("record inputs") as advance:
            images = plan.calibration(images_needed(samples, graphs.record))
            inputs = record_calls(graphs, images, besides, samples, cache, advance)
        if int8 := recipe.quantize_options:
            with stages.stage("quantize denoiser") as advance:
                graphs = quantize_denoisers(graphs, inputs, int8, cache, advance)
        if int4 := recipe.int4_options:
            with stages.stage("quantize weights") as advance:
                graphs = quantize_program_weights(graphs, inputs, int4, cache, advance)
        casts = measure_program_casts(graphs, inputs, recipe.targets, cache, stages)
        graphs = replace(graphs, casts=casts.found)

    # Beside each denoiser one that adds what adapters say, for the runs that set some.
    if recipe.adapters:
        with stages.stage("adapter slots") as advance:
            precisions = {table.precision for table in recipe.targets}
            graphs = graphs.with_slots(recipe.adapters, precisions, cache, advance)

    # Engines for every target: a bundle that is complete but for the evidence.
    with publish.workspace(output) as folder:
        about = {
            "name": recipe.name,
            "base_model": plan.checkpoint.name,
            "source_sha256": source,
            "family": plan.family and family_record(plan.family),
            "unjudged": not originals.precision,
            **rewritten.manifest_fields(),
        }
        fields = write_bundle(graphs, recipe.targets, about, folder, cache, stages)
        if casts:
            casts.check(folder, fields["targets"], stages)

        # How little an image has to change, from one step to the next, to be taken for finished.
        exits = None
        if table := recipe.early_exit:
            images = plan.calibration(max(table.prompts, len(plan.calls)))
            measuring = Measuring(images, tuple(besides))
            fields["targets"], exits = choose_exits(
                folder, fields["targets"], table.max_error, measuring, cache, stages
            )
            if any(target.early_exit for target in fields["targets"]):
                fields["requires"] = (*fields["requires"], "early_exit")
            publish.write_program_manifest(folder, fields)

        # The bundle against the pipeline: what can run here.
        judges = open_judges(recipe.evaluate, plan.folder, plan.captions)
        policies = [plan.policies.get(table.name, "all") for table in recipe.targets]
        judged_as = list(zip(fields["targets"], policies, strict=True))
        judged = judge_program(folder, fields["program"], judged_as, originals, judges, recipe.gate, stages)
        fields |= judged.fields

        # The report is written in any case; the bundle is published only if the gate holds.
        verified, parts = json.loads((entry / VERIFIED).read_text()), json.loads((entry / PARTS).read_text())
        evidence = ProgramEvidence(
            recipe, plan.call, plan.family, plan.summary, parts, verified, fields, originals, judged, graphs,
            rewritten.reports, timesteps, caching, exits, plan.arguments["why_not"], stages.seconds,
        )  # fmt: skip
        record = make_program_record(evidence)
        write_program_report(folder, record, evidence)
        if misses := missed(judged.gates):
            kept = keep(folder, output) / "report.html"
            raise CheckFailed(
                "the gate was missed; nothing was published:\n  " + "\n  ".join(misses),
                hint=f"look at {kept}, then change the recipe's targets, or its limits",
            )
        with stages.stage("publish"):
            manifest = publish.write_program_manifest(folder, fields)
            publish.publish(folder, output)
    return Compiled(output, manifest, record)
