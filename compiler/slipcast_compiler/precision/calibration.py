"""Calibration data: what components really read, on calibration prompts, over all timesteps."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Collection
from pathlib import Path

from slipcast.bundle.manifest import Caching
from slipcast.progress import Advance
from slipcast_compiler.engines.portable import write_portable
from slipcast_compiler.engines.recording import record
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.plan import Plan

TRAJECTORIES = 8  # at least so many, with as many prompts and seeds, where samples are few


def calibration_samples(
    plan: Plan, exported: dict[str, Path], prompts: Path | None, count: int, cache: Cache, advance: Advance
) -> Path:
    """A directory with `count` evaluations of the denoiser, denoiser/0000.npz and so on, from the cache or made; and of
    other components as many as there were, where a target casts them.

    Each holds the denoiser's inputs by name, with guidance in the batch, and its `prediction` in fp32, as the exported
    graphs give them in the runtime. Of every trajectory other steps are kept, so that together they cover all of them.
    Images never held out: image i is drawn from calibration prompt i with seed i. `prompts`: see package.describe.
    """
    plan = dataclasses.replace(plan, sampling=plan.measuring)
    images = min(count, max(TRAJECTORIES, math.ceil(count / plan.sampling.steps)))
    components = tuple(exported) if any(table.half for table in plan.recipe.targets) else ("denoiser",)
    return recorded(plan, exported, prompts, components, images, count, cache, advance)


def recorded(
    plan: Plan,
    exported: dict[str, Path],
    prompts: Path | None,
    components: Collection[str],
    images: int,
    count: int,
    cache: Cache,
    advance: Advance,
    staged: Path | None = None,
    caching: Caching | None = None,
    guard: Path | None = None,
) -> Path:
    """The same of other `components`, with as many `images`, sampled as the plan says; for `staged`, `caching` and
    `guard` see portable.py."""
    texts = plan.family.calibration if plan.family else (None,)
    chosen = tuple(texts[i % len(texts)] for i in range(images))

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".calibration-", dir=out.parent) as name:
            target = write_portable(plan, exported, prompts, Path(name), cache, staged, caching, guard)
            run_isolated(record, Path(name), target, tuple(components), chosen, count, out, advance=advance)

    inputs = {
        "exported": {component: source.name for component, source in exported.items()}, "prompts": chosen,
        "table": prompts and prompts.parent.name, "sampling": plan.sampling.model_dump(mode="json"), "count": count,
        "caching": caching and caching.model_dump(mode="json"), "guard": guard and guard.name,
        "components": sorted(components), "source": plan.checkpoint.sha256, "sizes": plan.sizes,
        "image": plan.image.model_dump(mode="json"), "reference": plan.reference.model_dump(mode="json"),
    }  # fmt: skip
    return cache.get("calibration", inputs, make)
