"""Charts: everything is inside its picture, and where its value says."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import numpy as np
import pytest
from markupsafe import Markup

from slipcast_compiler.pages.charts import (
    CHARACTER,
    Axis,
    Bar,
    Cell,
    Dot,
    Line,
    Piece,
    bars,
    heat_map,
    line_plot,
    panels,
    scatter,
)
from slipcast_compiler.pages.scales import LINE, decade_ticks, nice_ticks, pushed_apart
from slipcast_compiler.pages.svg import as_file

LONG = "artifacts/ablation/no-guidance-interval (0.0639 s)"
HOSTILE = '<script>"&'
CURVE = Line(LONG, [(0.0, 1.0), (1.0, 3.0)], band=[(0.5, 1.5), (2.0, 4.0)], dotted=True)
X, Y = Axis([0.0, 1.0], "steps", ticks=[0.0, 1.0]), Axis([0.5, 4.0])
CHARTS = {
    "lines": line_plot([CURVE, Line(HOSTILE, [(0.0, 2.0), (1.0, 3.0)], dashed=True)], X, Y, "lines"),
    "scatter": scatter([Dot(i / 9, 3.0, "tried", LONG, HOSTILE, end=2.0) for i in range(10)], X, Y, HOSTILE, 1.0),
    "panels": panels("title", {"a": [CURVE], HOSTILE: [CURVE]}, X, Y),
    "bars": bars([Bar(LONG, [Piece(3.0, "own", HOSTILE), Piece(1.0, "other")], "584 MB"), Bar("b", [])], "bars"),
    "heat map": heat_map({LONG: [Cell(0.5, HOSTILE)] * 8, "short": [Cell(1.0, "x")]}, "heat"),
}


def _tags(chart: Markup, name: str) -> Iterator[dict[str, str]]:
    root = ElementTree.fromstring(as_file(chart))
    return (dict(node.attrib) for node in root.iter() if node.tag.endswith(f"}}{name}"))


@pytest.mark.parametrize("name", CHARTS)
def test_no_label_leaves_its_picture(name: str) -> None:
    root = ElementTree.fromstring(as_file(CHARTS[name]))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    texts = [node for node in root.iter() if node.tag.endswith("}text")]
    assert texts
    for node in texts:
        long = 0.9 * CHARACTER * len(node.text or "")
        before = {"end": long, "middle": long / 2}.get(node.get("text-anchor", ""), 0.0)
        assert float(node.attrib["x"]) - before >= 0, node.text
        assert float(node.attrib["x"]) - before + long <= width, node.text
        assert 8 <= float(node.attrib["y"]) <= height, node.text


@pytest.mark.parametrize("name", CHARTS)
def test_texts_are_escaped_and_a_file_stands_alone(name: str) -> None:
    assert "<script" not in CHARTS[name]
    text = as_file(CHARTS[name])
    assert text.startswith("<svg xmlns=") and "var(" not in text
    ElementTree.fromstring(text)


def test_dots_stand_where_their_values_say() -> None:
    chart = scatter(
        [Dot(1.0, 0.0, "a"), Dot(10.0, 5.0, "b"), Dot(100.0, 10.0, "c")], Axis([1, 100], log=True), Axis([0, 10]), "x"
    )
    places = [(float(dot["cx"]), float(dot["cy"])) for dot in _tags(chart, "circle")]
    assert places[1] == pytest.approx(np.mean([places[0], places[2]], axis=0), abs=0.1)
    assert places[0][0] < places[2][0] and places[0][1] > places[2][1]  # up is more


def test_bars_are_as_long_as_their_values() -> None:
    widths = [float(bar["width"]) for bar in _tags(CHARTS["bars"], "rect") if "x" in bar]
    assert widths[0] == pytest.approx(3 * widths[1])


@pytest.mark.parametrize(("low", "high"), [(-0.21, 0.003), (0.0, 0.0), (17.0, 48.0), (-1e-5, 2e-5), (-0.9, -0.1)])
def test_ticks_hold_all_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_ticks_of_decades() -> None:
    assert decade_ticks(0.09, 2.5) == [0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2]
    assert decade_ticks(0.42, 0.44) == [0.42]


def test_labels_are_pushed_apart_and_stay_inside() -> None:
    near = pushed_apart([50.0, 52.0, 51.0, 200.0], 0.0, 300.0)
    assert near == [50.0, 50.0 + 2 * LINE, 50.0 + LINE, 200.0]
    low = pushed_apart([99.0, 98.0, 100.0], 0.0, 100.0)
    assert max(low) == 100.0 and sorted(low) == [low[1], low[0], low[2]]
    crowd = sorted(pushed_apart([5.0] * 30, 0.0, 100.0))
    assert crowd[0] >= -0.1 and crowd[-1] <= 100.1
    assert all(b > a for a, b in itertools.pairwise(crowd))
