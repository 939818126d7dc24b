"""Geometry of the report's pictures of a search, in the units of their SVG view boxes; search.html draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slipcast_compiler.study.plots import nice_ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 70, 20, 14, 44
SMALLEST, LARGEST = 3.0, 9.0  # radius of a dot, whose area goes by memory
ROUND = (1, 1.5, 2, 3, 5, 7)  # in every decade, where a logarithmic axis may have a tick

Scale = Callable[[float], float]


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Latency against the distance of latents, of all trials; and against the gate's first metric, of those judged."""
    sound = [trial for trial in record["trials"] if "error" not in trial]
    if not sound:
        return []
    x = _logarithmic([trial["ratio"] for trial in sound], LEFT, WIDTH - RIGHT)
    radius = _radii(sound)
    distances = [trial["distance"] for trial in sound if trial["distance"] > 0]
    found = []
    if distances:
        y = _logarithmic(distances, HEIGHT - BOTTOM, TOP)
        placed = [trial for trial in sound if trial["distance"] > 0]
        marks = [_mark(record, t, x, y(t["distance"]), radius) for t in placed]
        ticks = _decades(min(distances), max(distances))
        found.append(_figure("distance of latents to the original's", marks, record, x, sound, y, ticks))
    first = record["gate"][0]
    judged = [trial for trial in sound if first["metric"] in trial.get("bounds", {})]
    if judged:
        values = [trial[of][first["metric"]] for trial in judged for of in ("quality", "bounds")]
        limit = -first["limit"] if first["sense"] == "drop" else first["limit"]
        shown = _near([*values], limit)
        ticks = nice_ticks(min(*shown, limit), max(*shown, limit))
        y = _linear(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
        marks = [
            _mark(record, t, x, y(t["quality"][first["metric"]]), radius) | {"end": y(t["bounds"][first["metric"]])}
            for t in judged if t["quality"][first["metric"]] in shown
        ]  # fmt: skip
        label = first["label"].replace("drop", "change")
        found.append(_figure(label, marks, record, x, sound, y, ticks) | {"limit": y(limit)})
    return found


def _figure(
    label: str, marks: list[dict[str, Any]], record: Mapping[str, Any], x: Scale, sound: Sequence[Mapping[str, Any]],
    y: Scale, ticks: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    ratios = [trial["ratio"] for trial in sound]
    order = {"tried": 0, "front": 1, "holds": 2, "chosen": 3}
    return {
        "label": label, "limit": None, "marks": sorted(marks, key=lambda mark: order[mark["kind"]]),
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM,
        "x_ticks": [{"at": x(tick), "label": f"{tick:g}"} for tick in _decades(min(ratios), max(ratios))],
        "y_ticks": [{"at": y(tick), "label": f"{tick:g}"} for tick in ticks],
    }  # fmt: skip


def _mark(
    record: Mapping[str, Any], trial: Mapping[str, Any], x: Scale, at: float, radius: Mapping[float, float]
) -> dict[str, Any]:
    kind = "front" if trial["number"] in record["front"] else "tried"
    kind = "chosen" if trial["number"] == record["chosen"] else "holds" if trial.get("holds") else kind
    title = f"trial {trial['number']}: {trial['ratio']:.3f} of the recipe's latency, {trial['memory_mb']:.0f} MB"
    return {
        "x": x(trial["ratio"]), "y": at, "end": at, "radius": radius[trial["memory_mb"]], "kind": kind,
        "title": f"{title}, distance {trial['distance']:.4f}",
    }  # fmt: skip


def _radii(trials: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    sizes = {trial["memory_mb"] for trial in trials}
    low, high = min(sizes), max(sizes)
    area = _linear(low, high, SMALLEST**2, LARGEST**2)
    return {size: round(math.sqrt(area(size)), 1) for size in sizes}


def _near(values: list[float], limit: float) -> list[float]:
    """Without those that are so far beyond the limit that all others would lie in a corner."""
    good = sorted(values, key=lambda value: abs(value - limit))
    spread = max(abs(good[len(good) // 2] - limit), 1e-3)
    return [value for value in values if abs(value - limit) <= 6 * spread]


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10**exponent for exponent in exponents for digit in ROUND]
    inside = [float(f"{tick:.3g}") for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside or [float(f"{low:.2g}")]


def _logarithmic(values: Sequence[float], begin: float, end: float) -> Scale:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = (high - low) * 0.05 or 0.1
    inner = _linear(low - margin, high + margin, begin, end)
    return lambda value: inner(math.log10(value))


def _linear(low: float, high: float, begin: float, end: float) -> Scale:
    width = high - low or 1.0
    return lambda value: round(begin + (value - low) / width * (end - begin), 1)
