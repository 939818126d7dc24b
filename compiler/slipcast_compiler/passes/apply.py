"""Run the passes of a recipe, each in a process of its own and cached under all that it read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import HeadMask, LowRankLayer
from slipcast.progress import Advance, Stages, silent
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.rewrite import TENSORS, UNCHANGED, Rewrite, fit, write_tensors
from slipcast_compiler.model.units import count_parameters
from slipcast_compiler.passes import PASSES, Context, Task
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.recipe.passes import PassesTable

REPORT = "report.json"


@dataclass(frozen=True)
class Rewritten:
    """The denoiser's changed tensors, and what each pass reports."""

    rewrite: Rewrite = UNCHANGED
    reports: Mapping[str, Any] = field(default_factory=dict)

    def manifest_fields(self) -> dict[str, Any]:
        """What the manifest says about the rewrite."""
        heads, ffn = self.reports.get("prune_heads"), self.reports.get("prune_ffn")
        fields: dict[str, Any] = {}
        if heads:
            masks = heads["layers"].items()
            fields |= {
                "head_retention_ratio": heads["retention"],
                "pruning_strategy": heads["options"]["criterion"],
                "head_masks": tuple(HeadMask(layer=name, heads=m["heads"], kept=tuple(m["kept"])) for name, m in masks),
            }
        if ffn:
            fields["ffn_retention_ratio"] = ffn["retention"]
        if factorised := self.reports.get("low_rank"):
            fields["low_rank_layers"] = tuple(
                LowRankLayer(layer=name, rank=m["rank"], energy_retained=m["energy"], speedup=m["speedup"])
                for name, m in factorised["layers"].items() if m["kept"]
            )  # fmt: skip
        return fields


def needs_profile(table: PassesTable) -> bool:
    """Whether a pass that is on reads what was measured on the family."""
    return any(PASSES[name].needs_profile(options) for name, options in table.chosen())


def apply_passes(
    table: PassesTable, task: Task, profile: Profile | None, cache: Cache, stages: Stages, of: str = ""
) -> Rewritten:
    """The denoiser rewritten by the passes that are on, in the order of PASSES; `of`: what stages call it."""
    done = Rewritten()
    for name, options in table.chosen():
        with stages.stage(f"pass {name} {of}".strip()) as advance:
            inputs = {
                **task.identity,
                "pass": name,
                "options": options.model_dump(mode="json"),
                "before": done.rewrite.digest,
                "profile": profile.digest if profile else None,
                **PASSES[name].reads(task),
            }

            def make(out: Path, name: str = name, before: Rewrite = done.rewrite, options: Any = options) -> None:
                run_isolated(_run, name, options, Context(task, profile, silent), before, out, advance=advance)

            entry = cache.get("pass", inputs, make, runs=[type(task).__module__])
            written = Rewrite(entry / TENSORS) if (entry / TENSORS).exists() else done.rewrite
            done = Rewritten(written, {**done.reports, name: json.loads((entry / REPORT).read_text())})
    return done


def _run(name: str, options: Any, context: Context, before: Rewrite, out: Path, advance: Advance) -> None:
    """One pass: its tensors on top of the earlier ones (none where it changed nothing), and its report, in `out`."""
    denoiser = context.task.denoiser(before)
    result = PASSES[name].run(denoiser, replace(context, advance=advance), options)
    parameters = [count_parameters(denoiser.module)]
    if result.tensors:
        write_tensors(result.tensors, before, out / TENSORS)
    fit(denoiser.module, {key: array.shape for key, array in result.tensors.items()})
    parameters.append(count_parameters(denoiser.module))
    (out / REPORT).write_text(json.dumps({**result.report, "parameters": parameters}, allow_nan=False))
