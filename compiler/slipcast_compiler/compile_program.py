"""The compile of a captured pipeline, in order. Each stage is a call, as in compile.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from slipcast.errors import CheckFailed
from slipcast.progress import Stages
from slipcast_compiler.compile import Compiled
from slipcast_compiler.engines.contents import family_record
from slipcast_compiler.engines.programs import write_bundle
from slipcast_compiler.export.pipeline import VERIFIED
from slipcast_compiler.export.program import PARTS
from slipcast_compiler.graphs_program import add_strangers, export_program, record_inputs, specialise
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.machine import wait_without_spinning
from slipcast_compiler.judge.captured import draw_originals
from slipcast_compiler.judge.elsewhere import load_originals
from slipcast_compiler.judge.gate import missed
from slipcast_compiler.judge.judges import open_judges
from slipcast_compiler.judge.programs import arguments_of, judge_program
from slipcast_compiler.model.digests import digest
from slipcast_compiler.pages.evidence import keep
from slipcast_compiler.pages.program import ProgramEvidence, make_program_record, write_program_report
from slipcast_compiler.plan_program import ProgramPlan
from slipcast_compiler.precision.programs import measure_program_casts
from slipcast_compiler.schedule.early_exit import Measuring, choose_exits
from slipcast_compiler.search.captured import Captured
from slipcast_compiler.search.run import choose_by_search


def compile_program(plan: ProgramPlan, output: Path, cache: Cache, stages: Stages) -> Compiled:
    """Make the bundle at `output`. Raises CheckFailed where the program is not the pipeline, or, with the report
    written beside it, where the gate is missed."""
    wait_without_spinning()
    source = digest(plan.checkpoint.root, plan.recipe.model.pipeline)

    # The point of the recipe's space that is best within the gate, on calibration prompts.
    searched = None
    if plan.recipe.search:
        plan, searched = choose_by_search(Captured(plan, source), cache, stages)
    recipe = plan.recipe

    # What a larger machine drew of held-out prompts, and of those out of the family.
    originals = None
    if plan.drawn:
        originals = load_originals(plan.folder / str(recipe.evaluate.originals), plan.asked, plan.drawn)

    # The pipeline's own program, with its denoisers rewritten for the family.
    exported = export_program(plan, source, cache, stages)

    # Else the pipeline itself draws what the bundle is judged against.
    if not originals:
        with stages.stage("originals") as advance:
            drawings = plan.asked.drawing(plan.precision), plan.asked.outside(plan.precision)
            originals = draw_originals(*drawings, plan.given(source), cache, advance)

    # Everything that the bundle is built from, as the recipe asks.
    besides = arguments_of(exported.graphs.record, originals)
    made = specialise(plan, exported, besides, cache, stages)
    graphs = made.graphs

    # What half precision would spoil, in any component, stays in fp32.
    casts = None
    if recipe.samples_needed or any(table.half for table in recipe.targets):
        inputs = made.inputs or record_inputs(plan, graphs, besides, cache, stages)
        casts = measure_program_casts(graphs, inputs, recipe.targets, cache, stages)
        graphs = replace(graphs, casts=casts.found)

    # Beside each denoiser one that adds what adapters say, for the runs that set some.
    if recipe.adapters:
        with stages.stage("adapter slots") as advance:
            precisions = {table.precision for table in recipe.targets}
            graphs = graphs.with_slots(recipe.adapters, precisions, cache, advance)

    # And, for prompts out of the family, the denoisers as they were.
    graphs = add_strangers(plan, source, graphs, cache, stages)

    # Engines for every target: a bundle that is complete but for the evidence.
    with publish.workspace(output) as folder:
        about = {
            "name": recipe.name,
            "base_model": plan.checkpoint.name,
            "source_sha256": source,
            "family": plan.family and family_record(plan.family),
            "unjudged": not originals.precision,
            **made.rewritten.manifest_fields(),
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
        entry = graphs.entry
        verified, parts = json.loads((entry / VERIFIED).read_text()), json.loads((entry / PARTS).read_text())
        parts = {name: part for name, part in parts.items() if name not in graphs.left_out}
        evidence = ProgramEvidence(
            recipe, plan.call, plan.family, plan.summary, parts, verified, fields, originals, judged, graphs,
            made.rewritten.reports, searched, made.reports, exits, plan.arguments["why_not"], stages.seconds,
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
