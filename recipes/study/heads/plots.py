"""The study's plots as SVG files: lines over the ratio, one panel for each family, with bands for the intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heads.answers import Data, Interval, Mask, change, contrast, distance, which
from heads.cases import OUT, held_out
from heads.recipe import GENERIC
from slipcast_compiler.pages.charts import Axis, Line
from slipcast_compiler.pages.charts import panels as draw_panels
from slipcast_compiler.pages.svg import as_file

Panels = dict[str, list[Line]]  # a name has one colour in all of them


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
            banded(mask.title, tuple((r, measure(data, mask, r, held_out(family))) for r in data.ratios(mask)))
            for mask in data.masks
            if mask.calibration in (family, None)
        ]
        for family in data.families
    }


def paired_lines(data: Data) -> Panels:
    """Q1 at each ratio."""
    return {
        family: [
            banded(
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
                    panels[family].append(banded(f"{whose} mask, {title}", points))
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
                panels[family].append(banded(mask.title + generic, points))
    return panels


def pairs(data: Data, family: str) -> list[tuple[Mask, Mask]]:
    """The family's masks that have a generic counterpart, with it."""
    return [
        (mask, other)
        for mask in data.masks
        if mask.calibration == family and not mask.recovered
        for other in [Mask(mask.criterion, mask.correct, GENERIC)]
        if other in data.masks
    ]


def percent(value: float) -> str:
    """As in the tables."""
    return f"{value:+.0%}" if abs(value) >= 0.1 or value == 0 else f"{value:+.1%}"


def decibel(value: float) -> str:
    """Without a sign."""
    return f"{value:.0f}"


def figure(
    title: str,
    panels: Panels,
    label: Callable[[float], str],
    axis: str = "heads removed",
    marked: Sequence[float] | None = None,
) -> str:
    """SVG text; "" where no panel has a line. All panels share their axes. `axis`: what the ratio is of; `marked`: at
    which ratios it is written, if not at all of them."""
    lines = [line for panel in panels.values() for line in panel if line.points]
    if not lines:
        return ""
    ratios = sorted({ratio for line in lines for ratio, _ in line.points})
    x = Axis(ratios, axis, form="{:.0%}".format, ticks=marked or ratios)
    y = Axis([end for line in lines for ends in line.band for end in ends], form=label)
    return as_file(draw_panels(title, panels, x, y))


def banded(name: str, points: Sequence[tuple[float, Interval]]) -> Line:
    """A line through values over ratios, with their intervals around it."""
    return Line(
        name,
        points=[(ratio, found["value"]) for ratio, found in points],
        band=[(found["low"], found["high"]) for _, found in points],
        dotted=True,
    )
