"""Geometry of the page's plots, in the units of their SVG view boxes; the template draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slipcast_compiler.bench.plan import BUNDLE

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 160, 14, 40  # margins: labels stand to the right of what they name
ROW = 26
CHARACTER = 5.8  # its width in labels, on the mean


def scatter(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds per image (logarithmic) against quality: PSNR, or the change of the CLIP score where no side has one."""
    for metric, label in (("psnr_mean", "PSNR to the original, dB"), ("clip_delta_mean", "CLIP change")):
        points = [
            (name, side["seconds"]["median"], side["quality"][metric]["value"])
            for name, side in document["sides"].items() if side["quality"] and side["quality"][metric]
        ]  # fmt: skip
        if points:
            x = _scale([math.log10(s) for _, s, _ in points], LEFT, WIDTH - RIGHT)
            y = _scale([value for *_, value in points], HEIGHT - BOTTOM, TOP)
            marks = [
                _labelled({"name": name, "x": x(math.log10(s)), "y": y(value), "label": f"{name} ({s:.3g} s)"})
                for name, s, value in points
            ]
            return {"label": label, "marks": _apart(marks), "y_ticks": _ticks(y, [v for *_, v in points])}
    return None


def bars(document: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory by side."""
    values = {name: side["peak_memory_mb"] for name, side in document["sides"].items()}
    largest = max(values.values())
    rows = [
        {"name": name, "y": i * ROW, "width": (WIDTH - 2 * RIGHT) * value / largest, "label": f"{value:.0f} MB"}
        for i, (name, value) in enumerate(values.items())
    ]
    return {"rows": rows, "height": ROW * len(rows)}


def stacks(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds per image by component, of the sides that tell."""
    told = {name: side["components_s"] for name, side in document["sides"].items() if side["components_s"]}
    if not told:
        return None
    largest = max(sum(parts.values()) for parts in told.values())
    names = list(dict.fromkeys(part for parts in told.values() for part in parts))
    rows = []
    for i, (name, parts) in enumerate(told.items()):
        x, pieces = 0.0, []
        for part in names:
            seconds = parts.get(part, 0.0)
            width = (WIDTH - 2 * RIGHT) * seconds / largest
            pieces.append({"x": x, "width": width, "kind": names.index(part), "title": f"{part}: {seconds:.4f} s"})
            x += width
        steps = document["sides"][name]["about"]["steps"]
        label = f"{parts.get('denoiser', 0.0) / steps * 1e3:.1f} ms a step"
        rows.append({"name": name, "y": i * ROW, "pieces": pieces, "end": x, "label": label})
    return {"rows": rows, "height": ROW * len(rows), "names": names}


def break_even(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds spent after n images: the bundle begins with its compile, peers with nothing, as the counts have it."""
    counts = [count for count in document["break_even"].values() if count]
    if not counts:
        return None
    # A peer that is hardly slower pays back so late that all other crossings would be in the corner.
    most, compile_s = 1.3 * max(count for count in counts if count <= 5 * min(counts)), document["compile_s"]
    # A peer that is far slower would press all others into the ground.
    top = 1.15 * (compile_s + most * document["sides"][BUNDLE]["seconds"]["median"])
    lines = []
    for name, side in document["sides"].items():
        begin = compile_s if name == BUNDLE else 0.0
        slope = max(side["seconds"]["median"], 1e-6)
        end = min(most, (top - begin) / slope)
        if end > 0:
            lines.append({"name": name, "from": (0.0, begin), "to": (end, begin + slope * end)})
    x, y = _linear(0, most, LEFT, WIDTH - RIGHT), _linear(0, top, HEIGHT - BOTTOM, TOP)
    marks = [
        {"name": line["name"], "x1": x(line["from"][0]), "y1": y(line["from"][1]), "x": x(line["to"][0]),
         "y": y(line["to"][1]), "label": line["name"]}
        for line in lines
    ]  # fmt: skip
    return {
        "marks": _apart(marks), "x_ticks": [{"at": x(v), "label": f"{v:.0f}"} for v in (0, most / 2, most)],
        "y_ticks": [{"at": y(v), "label": f"{v:.0f}"} for v in (0, top / 2, top)],
    }  # fmt: skip


def _labelled(mark: dict[str, Any]) -> dict[str, Any]:
    """With its label on the left where there is no room on the right."""
    fits = mark["x"] + 9 + CHARACTER * len(mark["label"]) < WIDTH
    return mark | {"label_x": mark["x"] + (9 if fits else -9), "anchor": "start" if fits else "end"}


def _apart(marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Labels of marks that lie close get lines of their own."""
    last = -math.inf
    for mark in sorted(marks, key=lambda mark: mark["y"]):
        mark["label_y"] = last = max(mark["y"], last + 13)
    over = max(0.0, last - (HEIGHT - BOTTOM - 8))
    return [mark | {"label_y": round(mark["label_y"] - over, 1)} for mark in marks]


def _ticks(scale: Any, values: Sequence[float]) -> list[dict[str, Any]]:
    shown = sorted({min(values), max(values)})
    return [{"at": scale(value), "label": f"{value:.4g}"} for value in shown]


def _scale(values: Sequence[float], begin: float, end: float) -> Any:
    low, high = min(values), max(values)
    margin = (high - low) * 0.1 or 1.0
    return _linear(low - margin, high + margin, begin, end)


def _linear(low: float, high: float, begin: float, end: float) -> Any:
    return lambda value: round(begin + (value - low) / (high - low) * (end - begin), 1)
