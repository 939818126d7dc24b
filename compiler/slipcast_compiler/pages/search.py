"""What a report says and draws of a search: the record's format, which search/record.py fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from markupsafe import Markup
from pydantic import Field, JsonValue

from slipcast.bundle.validation import Strict
from slipcast_compiler.pages.charts import Axis, Dot, scatter
from slipcast_compiler.pages.scales import linear

SMALLEST, LARGEST = 3.0, 9.0  # radius of a dot, whose area goes by memory
ON_TOP = ("tried", "front", "holds", "chosen")  # kinds of dots, as they cover each other

Figure = tuple[str, Markup]  # its caption first
Drawn = Callable[..., Dot]


class Limit(Strict):
    """One of the gate's. `sense`: the metric falls by at most `limit`, or is at most or at least that."""

    metric: str
    label: str
    limit: float
    sense: Literal["drop", "at most", "at least"]


class Trial(Strict):
    """A point: `arguments` are the `--set` options that make it again. With an `error`, some figures are missing.

    `ratio`: its latency by the recipe's own; `distance`: of its results to the original's. Judged trials have the
    metrics of their pictures, the ends of the intervals that limits have to hold for, and whether all do.
    """

    number: int
    arguments: str
    overrides: dict[str, JsonValue]
    took_s: float
    prepare_s: float = 0.0
    objective: float | None = None
    ratio: float | None = None
    seconds: float | None = None
    memory_mb: float | None = None
    distance: float | None = None
    quality: dict[str, float] | None = None
    bounds: dict[str, float] | None = None
    holds: bool | None = None
    error: str | None = None


class SearchRecord(Strict):
    """Trials in their order; those on the Pareto front and the chosen one by number."""

    objective: str
    budget_minutes: float
    seed: int
    spent_minutes: float
    levers: dict[str, tuple[JsonValue, ...]]
    gate: tuple[Limit, ...]
    front: tuple[int, ...]
    chosen: int | None
    overrides: dict[str, JsonValue]
    arguments: str
    nearest: str
    trials: tuple[Trial, ...] = Field(repr=False)

    def plain(self) -> dict[str, Any]:
        """As report.json has it: of a trial, what there is."""
        return self.model_dump(mode="json") | {
            "trials": [trial.model_dump(mode="json", exclude_none=True) for trial in self.trials]
        }


def figures(record: SearchRecord) -> list[Figure]:
    """Latency against the distance of results, of all trials; and against the gate's first metric, of those judged."""
    sound = [trial for trial in record.trials if trial.error is None]
    if not sound:
        return []
    radius = _radii(sound)

    def dot(trial: Trial, y: float, end: float | None = None) -> Dot:
        title = f"trial {trial.number}: {trial.ratio:.3f} of the recipe's latency, {trial.memory_mb:.0f} MB"
        title += f", distance {trial.distance:.4f}"
        return Dot(trial.ratio or 0.0, y, _kind(record, trial), title=title, radius=radius(trial), end=end)

    x = Axis(
        [trial.ratio or 0.0 for trial in sound], label="latency, in parts of the recipe's own", log=True, margin=0.05
    )
    return [*_of_distance(sound, x, dot), *(_of_quality(record.gate[0], sound, x, dot) if record.gate else ())]


def _of_distance(sound: Sequence[Trial], x: Axis, dot: Drawn) -> list[Figure]:
    distances = {trial.number: trial.distance for trial in sound if trial.distance}  # an exact copy has no logarithm
    if not distances:
        return []
    caption, y = "distance of results to the original's", Axis(list(distances.values()), log=True, margin=0.05)
    dots = [dot(trial, distances[trial.number]) for trial in sound if trial.number in distances]
    return [(caption, scatter(_ordered(dots), x, y, f"latency against {caption}"))]


def _of_quality(first: Limit, sound: Sequence[Trial], x: Axis, dot: Drawn) -> list[Figure]:
    judged = [
        (trial, trial.quality[first.metric], trial.bounds[first.metric])
        for trial in sound
        if trial.quality and trial.bounds and first.metric in trial.bounds
    ]
    if not judged:
        return []
    limit = -first.limit if first.sense == "drop" else first.limit
    shown = _near([value for _, *values in judged for value in values], limit)
    dots = [dot(trial, value, end) for trial, value, end in judged if value in shown]
    # An interval may end beyond what is near: its line is cut where the picture ends.
    low, high = min(*shown, limit), max(*shown, limit)
    cut = [Dot(d.x, d.y, d.kind, title=d.title, radius=d.radius, end=min(max(d.end or 0.0, low), high)) for d in dots]
    label = first.label.replace("drop", "change")
    caption = f"{label}: a line from each dot to the end of its interval, the limit dashed"
    return [(caption, scatter(_ordered(cut), x, Axis([low, high]), f"latency against {label}", limit))]


def _kind(record: SearchRecord, trial: Trial) -> str:
    if trial.number == record.chosen:
        return "chosen"
    return "holds" if trial.holds else "front" if trial.number in record.front else "tried"


def _ordered(dots: Sequence[Dot]) -> list[Dot]:
    return sorted(dots, key=lambda dot: ON_TOP.index(dot.kind))


def _radii(trials: Sequence[Trial]) -> Callable[[Trial], float]:
    sizes = [trial.memory_mb or 0.0 for trial in trials]
    area = linear(min(sizes), max(sizes), SMALLEST**2, LARGEST**2)
    return lambda trial: round(math.sqrt(area(trial.memory_mb or 0.0)), 1)


def _near(values: Sequence[float], limit: float) -> list[float]:
    """Without those that are so far beyond the limit that all others would lie in a corner."""
    good = sorted(values, key=lambda value: abs(value - limit))
    spread = max(abs(good[len(good) // 2] - limit), 1e-3)
    return [value for value in values if abs(value - limit) <= 6 * spread]
