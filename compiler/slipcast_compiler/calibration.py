"""Calibration data: what the denoiser really reads, on calibration prompts, over all timesteps."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

from slipcast.progress import Advance
from slipcast_compiler.build import build_target, exported_sources
from slipcast_compiler.build.pool import Pool
from slipcast_compiler.cache import Cache
from slipcast_compiler.isolate import run_isolated
from slipcast_compiler.package import describe
from slipcast_compiler.plan import Plan
from slipcast_compiler.publish import write_manifest
from slipcast_compiler.recipe import TargetTable
from slipcast_compiler.recording import record_denoiser

TRAJECTORIES = 8  # at least so many, with as many prompts and seeds, where samples are few


def calibration_samples(
    plan: Plan, exported: dict[str, Path], prompts: Path | None, count: int, cache: Cache, advance: Advance
) -> Path:
    """A directory with `count` evaluations of the denoiser, 0000.npz and so on, from the cache or made.

    Each holds the denoiser's inputs by name, with guidance in the batch, and its `prediction` in fp32, as the exported
    graphs give them in the runtime. Of every trajectory other steps are kept, so that together they cover all of them.
    Images never held out: image i is drawn from calibration prompt i with seed i. `prompts`: see package.describe.
    """
    plan = dataclasses.replace(plan, sampling=plan.measuring)
    texts = plan.family.calibration if plan.family else (None,)
    trajectories = min(count, max(TRAJECTORIES, math.ceil(count / plan.sampling.steps)))
    chosen = tuple(texts[i % len(texts)] for i in range(trajectories))

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="slipcast-calibration-") as name:
            folder = Path(name)
            table = TargetTable(engine="onnxruntime")
            sources, pool = exported_sources(exported), Pool(folder)
            target = build_target(table, sources, plan.image, pool, cache, lambda done, total: None)
            write_manifest(folder, {**describe(plan, exported, prompts, folder), "targets": (target,)})
            run_isolated(record_denoiser, folder, chosen, count, out, advance=advance)

    inputs = {
        "exported": {component: source.name for component, source in exported.items()}, "prompts": chosen,
        "table": prompts and prompts.parent.name, "sampling": plan.sampling.model_dump(mode="json"), "count": count,
    }  # fmt: skip
    return cache.get("calibration", inputs, make)
