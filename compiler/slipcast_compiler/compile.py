"""The whole compile, in order. Each stage is a call; what a stage does is in the module it calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.bundle.records import BaseManifest
from slipcast.errors import CheckFailed
from slipcast.progress import Stages
from slipcast_compiler.engines import build_targets, sources_of
from slipcast_compiler.engines.contents import write_contents
from slipcast_compiler.graphs import make_graphs
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.machine import wait_without_spinning
from slipcast_compiler.judge.evaluate import judge_targets
from slipcast_compiler.judge.gate import missed
from slipcast_compiler.judge.originals import run_originals
from slipcast_compiler.judge.weights import check_weights
from slipcast_compiler.pages import report
from slipcast_compiler.pages.evidence import keep
from slipcast_compiler.plan import Plan
from slipcast_compiler.precision.casts import measure_casts
from slipcast_compiler.schedule.early_exit import Measuring, choose_exits
from slipcast_compiler.search.described import Described
from slipcast_compiler.search.run import choose_by_search


@dataclass(frozen=True)
class Compiled:
    """The published bundle, and what report.json holds."""

    output: Path
    manifest: BaseManifest
    record: dict[str, Any]


def compile_plan(plan: Plan, output: Path, cache: Cache, stages: Stages) -> Compiled:
    """Make the bundle at `output`. Raises CheckFailed, with the report written beside it, where the gate is missed."""
    wait_without_spinning()

    # One number that is none would spoil every picture.
    with stages.stage("weights") as advance:
        check_weights(plan.checkpoint, cache, advance)

    # The point of the recipe's space that is best within the gate, on calibration prompts.
    searched = None
    if plan.recipe.search:
        plan, searched = choose_by_search(Described(plan), cache, stages)
    tables = plan.recipe.targets

    # The original: the pictures to compare with, and the noise floors below which no difference means anything.
    with stages.stage("originals") as advance:
        originals = run_originals(plan.evaluation, cache, advance)

    # Everything that the bundle is built from: the denoiser rewritten, exported, cut and quantised as the recipe asks.
    graphs = make_graphs(plan, cache, stages)

    # What half precision would spoil, in any component, stays in fp32.
    casts = measure_casts(graphs, tables, cache, stages)

    # Engines for every target: a bundle that is complete but for the evidence.
    with publish.workspace(output) as folder:
        sources = {table.name: sources_of(graphs, table.precision) for table in tables}
        targets = tuple(build_targets(sources, tables, folder, cache, stages, casts.found))
        fields = write_contents(graphs, folder)
        publish.write_manifest(folder, {**fields, "targets": targets})
        casts.check(folder, targets, stages)

        # How little an image has to change, from one step to the next, to be taken for finished.
        exits = None
        if table := plan.recipe.early_exit:
            measuring = Measuring(plan.drawing(table.prompts).images)
            targets, exits = choose_exits(folder, targets, table.max_error, measuring, cache, stages)
            if any(target.early_exit for target in targets):
                fields["requires"] = (*fields["requires"], "early_exit")
            publish.write_manifest(folder, {**fields, "targets": targets})

        # The bundle against the original: what can run here.
        judged = judge_targets(plan.evaluation, originals, folder, targets, cache, stages)
        fields |= judged.fields

        # The report is written in any case; the bundle is published only if the gate holds.
        evidence = report.Evidence(
            plan.recipe, graphs, fields, originals, judged, casts.found, searched, exits, stages.seconds
        )
        record = report.make_record(evidence)
        report.write(folder, record, evidence)
        if misses := missed(judged.gates):
            kept = keep(folder, output) / "report.html"
            raise CheckFailed(
                "the gate was missed; nothing was published:\n  " + "\n  ".join(misses),
                hint=f"look at {kept}, then change the recipe's targets, sampling or limits",
            )
        with stages.stage("publish"):
            manifest = publish.write_manifest(folder, fields)
            publish.publish(folder, output)
    return Compiled(output, manifest, record)
