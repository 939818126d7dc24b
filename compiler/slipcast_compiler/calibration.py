"""Calibration data: what components really read, on calibration prompts, over all timesteps."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

from slipcast.manifest import Caching
from slipcast.progress import Advance
from slipcast_compiler.cache import Cache
from slipcast_compiler.isolate import run_isolated
from slipcast_compiler.plan import Plan
from slipcast_compiler.portable import write_portable
from slipcast_compiler.recording import record

TRAJECTORIES = 8  # at least so many, with as many prompts and seeds, where samples are few


def calibration_samples(
    plan: Plan, exported: dict[str, Path], prompts: Path | None, count: int, cache: Cache, advance: Advance
) -> Path:
    """A directory with `count` evaluations of the denoiser, denoiser/0000.npz and so on, from the cache or made; and of
    other components as many as there were.

    Each holds the inputs by name, with guidance in the batch, and the outputs in fp32 (the denoiser's `prediction`), as
    the exported graphs give them in the runtime. Of every trajectory other steps are kept, so that together they cover
    all of them. Images never held out: image i is drawn from calibration prompt i with seed i. `prompts`: see
    package.describe.
    """
    plan = dataclasses.replace(plan, sampling=plan.measuring)
    images = min(count, max(TRAJECTORIES, math.ceil(count / plan.sampling.steps)))
    return recorded_components(plan, exported, prompts, images, count, cache, advance)


def recorded_components(
    plan: Plan,
    exported: dict[str, Path],
    prompts: Path | None,
    images: int,
    count: int,
    cache: Cache,
    advance: Advance,
    staged: Path | None = None,
    caching: Caching | None = None,
    guard: Path | None = None,
) -> Path:
    """The same with as many `images`, sampled as the plan says; `staged`, `caching`, `guard`: see portable.py."""
    texts = plan.family.calibration if plan.family else (None,)
    chosen = tuple(texts[i % len(texts)] for i in range(images))

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="slipcast-calibration-") as name:
            target = write_portable(plan, exported, prompts, Path(name), cache, staged, caching, guard)
            run_isolated(record, Path(name), target, tuple(exported), chosen, count, out, advance=advance)

    inputs = {
        "exported": {component: source.name for component, source in exported.items()}, "prompts": chosen,
        "table": prompts and prompts.parent.name, "sampling": plan.sampling.model_dump(mode="json"), "count": count,
        "caching": caching and caching.model_dump(mode="json"), "guard": guard and guard.name,
    }  # fmt: skip
    return cache.get("calibration", inputs, make)
