"""The gate's limits on calibration prompts, with a margin: that of the 95 % interval over the pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slipcast_compiler.judge.gate import LIMITS
from slipcast_compiler.judge.metrics import Samples, intervals, summarise
from slipcast_compiler.recipe.recipe import GateTable


def judge(gate: GateTable, samples: Samples) -> dict[str, Any]:
    """`quality`: metric -> value; `bounds`: metric of the gate -> the end of its interval that the limit has to hold
    for (of a worst image, which has none, its value); `holds`: whether all do. Plain JSON."""
    quality = summarise(samples).model_dump(exclude_none=True)
    if not all(map(math.isfinite, quality.values())):
        return {"quality": {}, "bounds": {}, "holds": False}
    ends, bounds = intervals(samples), dict[str, float]()
    for _, _, metric, sense in limits(gate):
        if metric in quality:
            low, high = ends.get(metric, (quality[metric], quality[metric]))
            bounds[metric] = high if sense == "at most" else low
    return {"quality": quality, "bounds": bounds, "holds": holds(gate, bounds)}


def limits(gate: GateTable) -> list[tuple[float, str, str, str]]:
    """(limit, label, metric, what holds it) of those that are set; see evaluate.LIMITS."""
    rows = ((getattr(gate, field), label, metric, sense) for label, field, metric, sense in LIMITS)
    return [row for row in rows if row[0] is not None]


def holds(gate: GateTable, values: Mapping[str, float]) -> bool:
    """Whether all limits do, of these values by metric; one that was not run holds none."""
    for limit, _, metric, sense in limits(gate):
        value = values.get(metric, math.nan)
        if not (-value <= limit if sense == "drop" else value <= limit if sense == "at most" else value >= limit):
            return False
    return True
