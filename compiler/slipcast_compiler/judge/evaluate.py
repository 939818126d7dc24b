"""How far a bundle's pictures are from the original's, beside the noise floors; and the gate."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Comparison, Metrics, Performance, Quality, Target
from slipcast.engines import refusal
from slipcast.errors import HostError
from slipcast.progress import Advance
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.lpips import Lpips
from slipcast_compiler.judge.metrics import Reference, Samples, choose_captions, intervals, summarise
from slipcast_compiler.judge.scorer import Scorer
from slipcast_compiler.model import original
from slipcast_compiler.plan import Plan, Prompts
from slipcast_compiler.recipe.recipe import GateTable

logger = logging.getLogger("slipcast")

Floats = npt.NDArray[np.float32]
MEASURED = 3  # images that time and memory of the original are taken from
# label, field of GateTable, metric, and what holds it: it is at most the limit, at least, or falls by at most that.
LIMITS = (
    ("CLIP drop, mean", "clip_drop", "clip_delta_mean", "drop"),
    ("CLIP drop, worst image", "clip_drop_worst", "clip_delta_worst", "drop"),
    ("Retrieval drop", "retrieval_drop", "retrieval_drop", "at most"),
    ("LPIPS, mean", "lpips", "lpips_mean", "at most"),
    ("SSIM, worst image", "ssim", "ssim_worst", "at least"),
    ("PSNR, worst image (dB)", "psnr", "psnr_worst", "at least"),
)


@dataclass(frozen=True)
class Run:
    """Pictures of one run, with time and memory; images float32 [n, h, w, 3] in [0, 1]."""

    images: Floats
    seconds: tuple[float, ...]
    load_s: float
    peak_memory_mb: float
    components_s: dict[str, float]
    distances: tuple[float, ...] = ()  # of the prompts from the family, where the bundle has a guard

    @property
    def latency_s(self) -> float:
        """Median seconds of one image."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Originals:
    """The unchanged model's pictures, float32 [n, h, w, 3]: the reference, and two runs that give the noise floors.

    The reference goes on, after the held-out prompts, with those out of the family. `drawn`: the run of the held-out
    ones, unless they came from the cache.
    """

    prompts: Prompts
    seeds: tuple[int, ...]
    fp32: Floats
    bf16: Floats
    other_seeds: Floats
    drawn: Run | None = None


@dataclass(frozen=True)
class GateRow:
    """One limit: `value` and `floor` are None where the metric was not run, `passed` where nothing was asked."""

    metric: str
    limit: float | None
    value: float | None
    floor: float | None
    passed: bool | None


def run_originals(plan: Plan, cache: Cache, advance: Advance) -> Originals:
    """Reference pictures and the runs behind the noise floors, from the cache where nothing has changed."""
    first, count, strangers = plan.recipe.evaluate.seed, len(plan.prompts), plan.out_of_family
    seeds, others, last = (
        tuple(range(begin, begin + length))
        for begin, length in ((first, count), (first + count, count), (first + 2 * count, len(strangers)))
    )
    wanted: list[tuple[Prompts, tuple[int, ...], str, bool]] = [
        (plan.prompts, seeds, "float32", True), (plan.prompts, seeds, "bfloat16", False),
        (plan.prompts, others, "float32", False), (strangers, last, "float32", False),
    ]  # fmt: skip
    total, done, runs = 3 * count + len(strangers), 0, []
    for prompts, chosen, dtype, timed in wanted:

        def report(i: int, _: int, before: int = done) -> None:
            advance(before + i, total)

        if prompts:
            runs.append(_drawn(plan, prompts, chosen, dtype, timed, cache, report))
        done += len(prompts)
    fp32, bf16, other_seeds, *rest = (images for images, _ in runs)
    reference = np.concatenate([fp32, *rest])
    return Originals((*plan.prompts, *strangers), seeds + last, reference, bf16, other_seeds, runs[0][1])


def measure_original(plan: Plan, originals: Originals, advance: Advance) -> Run:
    """Time and memory of the original in fp32, of this compile: pictures may come from a cache, figures may not."""
    if originals.drawn:
        return originals.drawn
    prompts, seeds = originals.prompts[:MEASURED], originals.seeds[:MEASURED]
    arguments = (plan.checkpoint.root, plan.reference, plan.size, prompts, seeds, "float32", True)
    isolated = run_isolated(original.make_images, *arguments, advance=advance)
    return _run(isolated.result, isolated.peak_memory_mb)


def not_runnable(targets: Sequence[Target]) -> dict[str, str]:
    """Target -> why it cannot run on this machine, and so is not judged. Raises HostError where that is all of them."""
    found = {target.id: why for target in targets if (why := refusal(target))}
    for name, why in found.items():
        logger.warning("%s is in the bundle, but was not run here and is not judged: %s", name, why)
    if len(found) == len(targets):
        raise HostError(
            "no target can run here, so that no picture could be judged", got="; ".join(found.values()),
            hint='add a target that can: [[targets]] engine = "onnxruntime"',
        )  # fmt: skip
    return found


def measure_memory(root: Path, target: Target) -> dict[str, float]:
    """Megabytes that each component adds, each in a process of its own: freed memory is used again, and not seen."""
    found = {name: run_isolated(bundled.measure_memory, root, target.id, name).result for name in target.components}
    return {str(name): megabytes for name, megabytes in found.items() if megabytes is not None}


def run_bundle(root: Path, target: Target, originals: Originals, advance: Advance) -> Run:
    """The same prompts and seeds through the runtime, in a process of its own."""
    arguments = (root, target.id, originals.prompts, originals.seeds, len(originals.bf16))
    isolated = run_isolated(bundled.make_images, *arguments, advance=advance)
    return _run(isolated.result, isolated.peak_memory_mb)


class Judge:
    """Measures runs against the originals; what belongs to the originals alone is computed once."""

    def __init__(
        self, originals: Originals, scorer: Scorer | None = None, lpips: Lpips | None = None,
        captions: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`captions`: the family's, for retrieval; see metrics.Reference."""
        self._count = count = len(originals.bf16)
        prompts, strangers = originals.prompts[:count], originals.prompts[count:]
        self._held_out = held_out = Reference(originals.fp32[:count], prompts, scorer, lpips, captions)
        captions_too = (*captions, *choose_captions([prompt or "" for prompt in strangers]))
        self._outside = strangers and Reference(originals.fp32[count:], strangers, scorer, lpips, captions_too)
        self._fixed: dict[str, Any] = {
            "noise_floor": {
                "precision": _floor(held_out.sample(originals.bf16)),
                "seed": _floor(held_out.sample(originals.other_seeds, pixels=False)),
            },
            "scorer_sha256": scorer.sha256 if scorer else None,
            "lpips_sha256": lpips.sha256 if lpips else None,
            "retrieval_captions": len(captions) if scorer else 0,
        }

    def __call__(self, run: Run) -> Quality:
        """All metrics of a run, of held-out prompts and of those out of the family apart."""
        held_out, others = run.images[: self._count], run.images[self._count :]
        outside = Comparison(**_compare(self._outside, others)) if self._outside else None
        return Quality(**_compare(self._held_out, held_out), **self._fixed, out_of_family=outside)


def open_judge(plan: Plan, originals: Originals) -> Judge:
    """With the scorer and the weights that the recipe names."""
    table = plan.recipe.evaluate
    scorer = Scorer(table.scorer, plan.folder) if table.scorer else None
    lpips = Lpips(plan.folder / table.lpips) if table.lpips else None
    family = plan.family.calibration + plan.family.held_out if plan.family else ()
    return Judge(originals, scorer, lpips, choose_captions(family))


def _floor(samples: Samples) -> Metrics:
    """As summarise, but nothing where the unchanged model's own pictures are not finite: that is no floor."""
    found = summarise(samples)
    if all(value is None or math.isfinite(value) for value in found.model_dump().values()):
        return found
    logger.warning("the original in bf16, or with other seeds, makes broken pictures: a noise floor is left out")
    return Metrics()


def _compare(reference: Reference, found: Floats) -> dict[str, Any]:
    """The fields of a Comparison."""
    samples = reference.sample(found)
    own = {"images": len(found), "original": reference.itself, "intervals": intervals(samples)}
    return summarise(samples).model_dump() | own


def performance(original_run: Run, run: Run, memory: dict[str, float]) -> Performance:
    """Time and memory of a run beside the original's; `memory` by component."""
    return Performance(
        peak_memory_full_mb=round(original_run.peak_memory_mb, 1),
        peak_memory_bundle_mb=round(run.peak_memory_mb, 1),
        components_memory_mb=memory,
        latency_full_s=round(original_run.latency_s, 4),
        latency_bundle_s=round(run.latency_s, 4),
        components_s={name: round(s, 5) for name, s in run.components_s.items()},
        load_s=round(run.load_s, 4),
    )


def apply_gate(gate: GateTable, quality: Quality) -> tuple[GateRow, ...]:
    """Every limit, with what the held-out prompts gave. What is not a number is missed, even without one."""
    floor = quality.noise_floor["precision"]
    rows = []
    for label, field, metric, sense in LIMITS:
        limit: float | None = getattr(gate, field)
        sign = -1 if sense == "drop" else 1  # a drop is counted upwards
        value, noise = (_signed(getattr(found, metric), sign) for found in (quality, floor))
        passed = None
        if limit is not None:
            passed = value is not None and (value >= limit if sense == "at least" else value <= limit)
        if value is not None and not math.isfinite(value):
            passed = False
        rows.append(GateRow(label, limit, value, noise, passed))
    other = quality.out_of_family.psnr_worst if quality.out_of_family else None
    if other is not None and not math.isfinite(other):  # no limit applies there, but a picture has to be one
        rows.append(GateRow("PSNR out of the family, worst image (dB)", None, other, None, False))
    return tuple(rows)


def missed(gates: Mapping[str, tuple[GateRow, ...]]) -> list[str]:
    """One line for every limit that does not hold."""
    lines = []
    for target, row in ((target, row) for target, rows in gates.items() for row in rows if row.passed is False):
        value = "not run" if row.value is None else f"{row.value:.4f}"
        lines.append(f"{target}: {row.metric} is {value}, limit {'none' if row.limit is None else row.limit}")
    return lines


def draw_original(
    plan: Plan, prompts: Prompts, seeds: tuple[int, ...], dtype: str, cache: Cache, advance: Advance
) -> Floats:
    """The original's pictures, by plan.reference, float32 [n, h, w, 3]; from the cache, or drawn."""
    return _drawn(plan, prompts, seeds, dtype, False, cache, advance)[0]


def _drawn(
    plan: Plan, prompts: Prompts, seeds: tuple[int, ...], dtype: str, timed: bool, cache: Cache, advance: Advance
) -> tuple[Floats, Run | None]:
    """The pictures, and the run that drew them, if they were not in the cache; its seconds are worth something where it
    was `timed`."""
    inputs: dict[str, Any] = {
        "checkpoint": plan.checkpoint.sha256, "sampling": plan.reference.model_dump(mode="json"), "size": plan.size,
        "prompts": prompts, "seeds": seeds, "dtype": dtype,
    }  # fmt: skip
    runs = list[Run]()

    def build(folder: Path) -> None:
        arguments = (plan.checkpoint.root, plan.reference, plan.size, prompts, seeds, dtype, timed)
        made = run_isolated(original.make_images, *arguments, advance=advance)
        runs.append(_run(made.result, made.peak_memory_mb))
        np.save(folder / "images.npy", made.result["images"])

    images: Floats = np.load(cache.get("original", inputs, build) / "images.npy")
    return images, runs[0] if runs else None


def _run(made: dict[str, Any], peak_memory_mb: float) -> Run:
    return Run(
        made["images"],
        tuple(map(float, made["seconds"])),
        float(made["load_s"]),
        peak_memory_mb,
        made.get("components_s", {}),
        tuple(made.get("distances", ())),
    )


def _signed(value: float | None, sign: int) -> float | None:
    return None if value is None else 0.0 + sign * value  # not -0.0
