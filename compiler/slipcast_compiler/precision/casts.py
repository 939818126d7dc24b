"""Targets in half precision: what stays in fp32 of each, measured on what a bundle will draw with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slipcast.bundle.manifest import Caching, Target
from slipcast.progress import Stages
from slipcast_compiler.engines import exported_sources
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.plan import Plan
from slipcast_compiler.precision.calibration import recorded
from slipcast_compiler.precision.mixed import IMAGES, SAMPLES, Found, check_cast, measure_cast
from slipcast_compiler.precision.quantize import Quantized


@dataclass(frozen=True)
class Casts:
    """By the name of each target in half precision, what was found; and the inputs that it is of."""

    plan: Plan
    found: dict[str, Found]
    inputs: Path | None

    def check(self, folder: Path, targets: Sequence[Target], stages: Stages) -> None:
        """mixed_precision.check_cast of the bundle at `folder`, which has targets in the recipe's order."""
        for table, target in zip(self.plan.recipe.targets, targets, strict=True):
            if found := self.found.get(table.name):
                assert self.inputs
                check_cast(folder, target, found, self.inputs, stages)


def measure_casts(
    plan: Plan,
    exported: dict[str, Path],
    quantized: Quantized | None,
    prompts: Path | None,
    staged: Path,
    caching: Caching | None,
    guard: Path | None,
    cache: Cache,
    stages: Stages,
) -> Casts:
    """mixed_precision.measure_cast of every target in half precision. `prompts`, `staged`, `caching`, `guard`: see
    portable.py.

    A denoiser in INT8 is measured as it was before: its nodes have the same names, and what rounding adds to its error
    is lost among the steps of INT8. What was recorded to calibrate it is taken for all.
    """
    half, sources = [table for table in plan.recipe.targets if table.half], exported_sources(exported)
    if not half:
        return Casts(plan, {}, None)
    inputs = quantized.samples.parent if quantized else None
    if not inputs or not all((inputs / name).is_dir() for name in exported):  # what draws strangers is not among them
        # Few steps cover all noise levels too; but masks of [caching] are of all, and a list has its own length.
        if plan.sampling.schedule and not caching:
            plan = replace(plan, sampling=plan.sampling.model_copy(update={"steps": min(SAMPLES, plan.sampling.steps)}))
        with stages.stage("record inputs") as advance:
            inputs = recorded(
                plan, exported, prompts, tuple(exported), IMAGES, SAMPLES, cache, advance, staged, caching, guard
            )  # fmt: skip
    with stages.stage("measure casts") as advance:
        found = {table.name: measure_cast(table, sources, inputs, cache, advance) for table in half}
    return Casts(plan, found, inputs)
