"""The bundle through the runtime, as a host would run it, against the original: every target that can run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import Target
from slipcast.progress import Stages
from slipcast_compiler.judge import evaluate
from slipcast_compiler.judge.evaluate import GateRow, Originals, Run
from slipcast_compiler.plan import Plan


@dataclass(frozen=True)
class Judged:
    """`targets`: all, with what was found of those that ran; by target id, what they drew, how the gate's limits hold,
    and why others could not run here."""

    targets: tuple[Target, ...]
    runs: Mapping[str, Run]
    gates: Mapping[str, tuple[GateRow, ...]]
    not_run: Mapping[str, str]

    @property
    def fields(self) -> dict[str, Any]:
        """The manifest's; of the whole bundle is said what is of its first target that ran."""
        first = next(target for target in self.targets if target.id in self.runs)
        return {"targets": self.targets, "quality": first.quality, "performance": first.performance}


def judge_targets(plan: Plan, folder: Path, targets: Sequence[Target], originals: Originals, stages: Stages) -> Judged:
    """Draw with every target of the bundle in `folder`, each in a process of its own."""
    with stages.stage("evaluate original") as advance:
        judge = evaluate.open_judge(plan, originals)
        before = evaluate.measure_original(plan, originals, advance)
    runs, judged, gates, not_run = {}, {}, {}, evaluate.not_runnable(targets)
    for target in (target for target in targets if target.id not in not_run):
        with stages.stage(f"evaluate {target.id}") as advance:
            runs[target.id] = run = evaluate.run_bundle(folder, target, originals, advance)
            quality = judge(run)
            performance = evaluate.performance(before, run, evaluate.measure_memory(folder, target))
        judged[target.id] = target.model_copy(update={"quality": quality, "performance": performance})
        gates[target.id] = evaluate.apply_gate(plan.recipe.gate, quality)
    return Judged(tuple(judged.get(target.id, target) for target in targets), runs, gates, not_run)
