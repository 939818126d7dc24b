"""The gate: the recipe's quality limits against what held-out prompts gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from slipcast.bundle.manifest import Quality
from slipcast_compiler.recipe.recipe import GateTable

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
class GateRow:
    """One limit: `value` and `floor` are None where the metric was not run, `passed` where nothing was asked."""

    metric: str
    limit: float | None
    value: float | None
    floor: float | None
    passed: bool | None


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


def _signed(value: float | None, sign: int) -> float | None:
    return None if value is None else 0.0 + sign * value  # not -0.0
