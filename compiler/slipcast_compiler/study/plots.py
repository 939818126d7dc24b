"""The study's plots as SVG files: lines over the ratio, one panel for each family, with bands for the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from slipcast_compiler.study.answers import Data, Interval, Mask, change, contrast, distance, which
from slipcast_compiler.study.cases import OUT, held_out
from slipcast_compiler.study.recipe import GENERIC

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 270, 230, 56, 30, 34, 14  # of a panel; margins around all
ROW = 17  # of the legend
# Okabe and Ito's palette, which colour-blind readers can tell apart
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")


@dataclass(frozen=True)
class Line:
    """Values with intervals over ratios; a name has one colour in all panels."""

    name: str
    points: tuple[tuple[float, Interval], ...]


Panels = dict[str, list[Line]]


def draw_all(data: Data) -> dict[str, str]:
    """Name of the plot -> SVG; without those that nothing was judged for."""
    found = {
        "clip": figure("Change of CLIP score, held-out prompts", held_out_lines(data, change), percent),
        "psnr": figure("PSNR to the unpruned model, dB, held-out prompts", held_out_lines(data, distance), decibel),
        "which": figure("CLIP: family mask minus generic mask", paired_lines(data), percent),
        "many": figure("Change of CLIP score in the family and outside, leave_one_out", range_lines(data), percent),
        "contrast": figure("CLIP change: in the family minus outside", contrast_lines(data), percent),
    }
    return {name: svg for name, svg in found.items() if svg}


def held_out_lines(data: Data, measure: Callable[[Data, Mask, float, str], Interval]) -> Panels:
    """Masks of the family's own calibration, and those of none."""
    return {
        family: [
            Line(mask.title, tuple((r, measure(data, mask, r, held_out(family))) for r in data.ratios(mask)))
            for mask in data.masks if mask.calibration in (family, None)
        ]
        for family in data.families
    }  # fmt: skip


def paired_lines(data: Data) -> Panels:
    """Q1 at each ratio."""
    return {
        family: [
            Line(
                a.title, tuple((r, which(data, [family], a.criterion, a.correct, [r], "clip")) for r in data.ratios(a))
            )
            for a, _ in pairs(data, family)
        ]
        for family in data.families
    }


def range_lines(data: Data) -> Panels:
    """The family's mask and the generic one, on prompts of the family and out of it."""
    panels: Panels = {}
    for family in data.families:
        panels[family] = []
        for calibration in (family, GENERIC):
            mask = Mask("leave_one_out", False, calibration)
            for title, name in (("held-out", held_out(family)), ("out of family", OUT)):
                if data.has(mask, name):
                    points = tuple((r, change(data, mask, r, name)) for r in data.ratios(mask))
                    whose = "generic" if calibration == GENERIC else "family"
                    panels[family].append(Line(f"{whose} mask, {title}", points))
    return panels


def contrast_lines(data: Data) -> Panels:
    """Q2 at each ratio."""
    panels: Panels = {}
    for family in data.families:
        panels[family] = []
        for mask in data.masks:
            if mask.calibration in (family, GENERIC) and data.has(mask, OUT) and data.has(mask, held_out(family)):
                points = tuple(
                    (r, contrast(data, (mask, held_out(family)), (mask, OUT), [r])) for r in data.ratios(mask)
                )
                generic = ", generic" if mask.calibration == GENERIC else ""
                panels[family].append(Line(mask.title + generic, points))
    return panels


def pairs(data: Data, family: str) -> list[tuple[Mask, Mask]]:
    """The family's masks that have a generic counterpart, with it."""
    return [
        (mask, other) for mask in data.masks if mask.calibration == family and not mask.recovered
        for other in [Mask(mask.criterion, mask.correct, GENERIC)] if other in data.masks
    ]  # fmt: skip


def percent(value: float) -> str:
    """As in the tables."""
    return f"{value:+.0%}" if abs(value) >= 0.1 or value == 0 else f"{value:+.1%}"


def decibel(value: float) -> str:
    """Without a sign."""
    return f"{value:.0f}"


def figure(
    title: str, panels: Panels, label: Callable[[float], str], axis: str = "heads removed",
    marked: Sequence[float] | None = None,
) -> str:  # fmt: skip
    """SVG text; "" where no panel has a line. All panels share their axes. `axis`: what the ratio is of; `marked`: at
    which ratios it is written, if not at all of them."""
    lines = [line for panel in panels.values() for line in panel if line.points]
    if not lines:
        return ""
    names = list(dict.fromkeys(line.name for line in lines))
    ratios = [ratio for line in lines for ratio, _ in line.points]
    ends = [found[end] for line in lines for _, found in line.points for end in ("low", "high")]
    ticks = nice_ticks(min(ends), max(ends))
    width = LEFT + len(panels) * (WIDTH + GAP)
    plotted = TOP + 24 + HEIGHT
    height = plotted + BOTTOM + ROW * math.ceil(len(names) / 3) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]  # fmt: skip
    for number, (family, panel) in enumerate(panels.items()):
        left = LEFT + number * (WIDTH + GAP)
        x = _scale(min(ratios), max(ratios), left + 18, left + WIDTH - 18)
        y = _scale(ticks[0], ticks[-1], plotted, TOP + 24)
        parts += _frame(family, left, plotted, ticks, marked or sorted(set(ratios)), x, y, label, number == 0, axis)
        parts += [part for line in panel for part in _curve(line, COLORS[names.index(line.name) % len(COLORS)], x, y)]
    parts += _legend(names, plotted + BOTTOM + 4, width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, some five of them."""
    rough = max(high - low, 1e-6) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _frame(
    family: str, left: float, bottom: float, ticks: Sequence[float], ratios: Sequence[float],
    x: Callable[[float], float], y: Callable[[float], float], label: Callable[[float], str], labelled: bool,
    axis: str,
) -> list[str]:  # fmt: skip
    parts = [f'<text x="{left + 8}" y="{TOP + 16}" font-weight="bold">{escape(family)}</text>']
    for tick in ticks:
        color = "#888" if tick == 0 else "#ddd"
        parts.append(f'<path d="M{left} {y(tick)}H{left + WIDTH}" stroke="{color}"/>')
        if labelled:
            parts.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{label(tick)}</text>')
    for ratio in ratios:
        parts.append(f'<text x="{x(ratio)}" y="{bottom + 16}" text-anchor="middle">{ratio:.0%}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{bottom + 30}" text-anchor="middle" fill="#555">{axis}</text>')
    return parts


def _curve(line: Line, color: str, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    if not line.points:
        return []
    upper = [f"{x(ratio)} {y(found['high'])}" for ratio, found in line.points]
    lower = [f"{x(ratio)} {y(found['low'])}" for ratio, found in reversed(line.points)]
    middle = [(x(ratio), y(found["value"])) for ratio, found in line.points]
    return [
        f'<path d="M{"L".join(upper + lower)}Z" fill="{color}" fill-opacity="0.13"/>',
        f'<path d="M{"L".join(f"{a} {b}" for a, b in middle)}" fill="none" stroke="{color}" stroke-width="1.8"/>',
        *(f'<circle cx="{a}" cy="{b}" r="2.4" fill="{color}"/>' for a, b in middle),
    ]


def _legend(names: Sequence[str], top: float, width: float) -> list[str]:
    column = (width - LEFT) / 3
    parts = []
    for number, name in enumerate(names):
        x, y = round(LEFT + number % 3 * column, 1), top + number // 3 * ROW + 8
        parts.append(f'<rect x="{x}" y="{y - 5}" width="14" height="4" fill="{COLORS[number % len(COLORS)]}"/>')
        parts.append(f'<text x="{x + 19}" y="{y}">{escape(name)}</text>')
    return parts


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    width = high - low or 1.0
    return lambda value: round(begin + (value - low) / width * (end - begin), 1)
