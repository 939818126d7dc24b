"""Charts as SVG: a caller says what is drawn, and here is where it comes to stand.

Colours are classes, whose rules svg.py has: of a page that includes them, or of a picture that stands alone. Margins
follow the texts, so that no label leaves its picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from slipcast_compiler.pages.scales import (
    LINE,
    Scale,
    decade_ticks,
    linear,
    logarithmic,
    nice_ticks,
    pushed_apart,
    spaced,
)
from slipcast_compiler.pages.svg import group, picture, tag, text, tooltip

PLOT_WIDTH, PLOT_HEIGHT, PANEL_WIDTH = 430, 240, 270
CHARACTER = 6.6  # its width, on the mean, at 12 pixels
GAP = 14  # between panels, and around what would touch an edge
ROW, CELL = 26, 18
BARS_WIDTH = 400
SERIES = 8


class Frame(NamedTuple):
    """What the axes enclose; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Axis:
    """`values` have to fit, with `margin` of their range to spare at both ends.

    A linear axis without `ticks` gets round ones, and goes from the first to the last of them.
    """

    values: Sequence[float]
    label: str = ""
    form: Callable[[float], str] = "{:g}".format
    ticks: Sequence[float] | None = None
    log: bool = False
    margin: float = 0.0

    @property
    def marks(self) -> Sequence[float]:
        """Where ticks are."""
        if self.ticks is not None:
            return self.ticks
        low, high = min(self.values), max(self.values)
        return decade_ticks(low, high) if self.log else nice_ticks(*spaced(low, high, self.margin))

    def scale(self, begin: float, end: float) -> Scale:
        """From values to coordinates."""
        if self.log:
            return logarithmic(min(self.values), max(self.values), begin, end, self.margin)
        if self.ticks is None:
            return linear(self.marks[0], self.marks[-1], begin, end)
        return linear(*spaced(min(self.values), max(self.values), self.margin), begin, end)


@dataclass(frozen=True)
class Line:
    """Points (x, y), and of each the `band` from low to high. A name has one colour, `kind` where that is given."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    kind: str = ""
    dashed: bool = False
    dotted: bool = False  # with a dot at each point


@dataclass(frozen=True)
class Dot:
    """`kind` is its class; a line goes from it to the value `end`."""

    x: float
    y: float
    kind: str
    label: str = ""
    title: str = ""
    radius: float = 5.0
    end: float | None = None


class Piece(NamedTuple):
    """Of a bar."""

    value: float
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Bar:
    """Pieces one after the other, and what is written behind them."""

    name: str
    pieces: Sequence[Piece]
    label: str = ""


class Cell(NamedTuple):
    """Of a heat map; level: 0 to 1."""

    level: float
    title: str


# --- charts ----------------------------------------------------------------------------------------------------------


def line_plot(lines: Sequence[Line], x: Axis, y: Axis, label: str) -> Markup:
    """Lines with their names at their ends. `label`: what the picture is, for those who cannot see it."""
    frame, width = _framed(y, [line.name for line in lines])
    at, up = x.scale(frame.left, frame.right), y.scale(frame.bottom, frame.top)
    ends = [(at(line.points[-1][0]), up(line.points[-1][1])) for line in lines]
    places = pushed_apart([end[1] for end in ends], frame.top, frame.bottom)
    drawn = list(_axes(frame, x, y))
    for number, (line, (end_x, end_y), place) in enumerate(zip(lines, ends, places, strict=True)):
        kind = "line" if end_x >= frame.right - 1 else "leader"  # of one that ends before, no line goes on
        leader = tag("path", class_=kind, d=f"M{end_x + 3:g} {end_y:g}L{frame.right + 16:g} {place:g}")
        name = text(line.name, frame.right + 20, place + 4)
        drawn.append(group(line.kind or _series(number), *_curve(line, at, up), leader, name))
    return picture(width, _height(frame, x), drawn, label)


def scatter(dots: Sequence[Dot], x: Axis, y: Axis, label: str, limit: float | None = None) -> Markup:
    """Dots in their order, the last on top, with labels beside them; `limit`: a dashed line at a value of y."""
    frame, width = _framed(y, [dot.label for dot in dots])
    at, up = x.scale(frame.left, frame.right), y.scale(frame.bottom, frame.top)
    drawn = list(_axes(frame, x, y))
    if limit is not None:
        drawn.append(_across(frame, up(limit), "limit"))
    places = pushed_apart([up(dot.y) for dot in dots], frame.top, frame.bottom - LINE / 2)
    for dot, place in zip(dots, places, strict=True):
        left, top = at(dot.x), up(dot.y)
        parts = []
        if dot.end is not None and dot.end != dot.y:
            parts.append(tag("path", class_="whisker", d=f"M{left} {top}V{up(dot.end)}"))
        parts.append(tag("circle", tooltip(dot.title), class_="dot", cx=left, cy=top, r=dot.radius))
        if dot.label:
            parts.append(text(dot.label, left + 9, place + 4))
        drawn.append(group(dot.kind, *parts))
    return picture(width, _height(frame, x), drawn, label)


def panels(title: str, panels: Mapping[str, Sequence[Line]], x: Axis, y: Axis) -> Markup:
    """Lines in one panel of each name, side by side with the same axes, and a legend below them."""
    names = list(dict.fromkeys(line.name for panel in panels.values() for line in panel))
    left, top = _room([y.form(tick) for tick in y.marks]) + 14, 54
    width = left + len(panels) * (PANEL_WIDTH + GAP)
    frame = Frame(left, top, left + PANEL_WIDTH, top + PLOT_HEIGHT)
    drawn = [text(title, left, 18, class_="title")]
    for number, (name, panel) in enumerate(panels.items()):
        here = frame._replace(left=left + number * (PANEL_WIDTH + GAP))
        here = here._replace(right=here.left + PANEL_WIDTH)
        at, up = x.scale(here.left + GAP, here.right - GAP), y.scale(here.bottom, here.top)
        drawn += [text(name, here.left + 8, top - 10, class_="name"), *_axes(here, x, y, at, first=number == 0)]
        drawn += [group(line.kind or _series(names.index(line.name)), *_curve(line, at, up)) for line in panel]
    bottom = _height(frame, x) + 8
    drawn += _legend(names, left, bottom, width)
    return picture(width, bottom + 17 * math.ceil(len(names) / 3) + 6, drawn, title)


def bars(rows: Sequence[Bar], label: str, *, shown: bool = False) -> Markup:
    """A row of each bar, the longest as long as there is room; `shown`: with the label as its title above them."""
    left, right = _room([row.name for row in rows]) + 8, _room([row.label for row in rows]) + 6
    top = 26 if shown else 0
    width = max(left + BARS_WIDTH + right, _room([label]) + 2 * GAP if shown else 0)
    scale = linear(0.0, max(sum(piece.value for piece in row.pieces) for row in rows), 0.0, BARS_WIDTH)
    drawn = [text(label, 8, 18)] if shown else []
    for number, row in enumerate(rows):
        y, end = top + number * ROW, left
        drawn.append(text(row.name, left - 8, y + 16, text_anchor="end"))
        for piece in row.pieces:
            shape = tag("rect", tooltip(piece.title), class_="bar", x=end, y=y + 4, width=scale(piece.value), height=16)
            drawn.append(group(piece.kind, shape))
            end += scale(piece.value)
        drawn.append(text(row.label, end + 6, y + 16))
    return picture(width, top + ROW * len(rows), drawn, label)


def heat_map(rows: Mapping[str, Sequence[Cell]], label: str) -> Markup:
    """A row of each name; the higher its level, the stronger a cell's colour."""
    left, drawn = _room(rows), []
    for number, (name, cells) in enumerate(rows.items()):
        drawn.append(text(name, 0, number * CELL + 13))
        for column, cell in enumerate(cells):
            place = {"x": left + column * CELL, "y": number * CELL, "width": CELL, "height": CELL}
            level = round(cell.level, 3)
            drawn.append(tag("rect", tooltip(cell.title), class_="cell", fill_opacity=level, **place))
    return picture(left + CELL * max(map(len, rows.values())), CELL * len(rows), drawn, label)


# --- parts of them ---------------------------------------------------------------------------------------------------


def _framed(y: Axis, names: Iterable[str]) -> tuple[Frame, float]:
    """With room for the axis's labels on the left and for names on the right; and the picture's width."""
    left = _room([y.form(tick) for tick in y.marks]) + 14
    return Frame(left, 12, left + PLOT_WIDTH, 12 + PLOT_HEIGHT), left + PLOT_WIDTH + max(GAP, 24 + _room(names))


def _height(frame: Frame, x: Axis) -> float:
    return frame.bottom + (40 if x.label else 22)


def _axes(frame: Frame, x: Axis, y: Axis, at: Scale | None = None, *, first: bool = True) -> Iterable[Markup]:
    """Lines across at the ticks of y, ticks below of x; numbers of y at the first panel alone."""
    up, at = y.scale(frame.bottom, frame.top), at or x.scale(frame.left, frame.right)
    for tick in y.marks:
        yield _across(frame, up(tick), "zero" if tick == 0 else "grid")
        if first:
            yield text(y.form(tick), frame.left - 6, up(tick) + 4, text_anchor="end")
    for tick in x.marks:
        yield tag("path", class_="axis", d=f"M{at(tick):g} {frame.bottom:g}v4")
        yield text(x.form(tick), at(tick), frame.bottom + 17, text_anchor="middle")
    if x.label:
        middle = (frame.left + frame.right) / 2
        yield text(x.label, middle, frame.bottom + 33, class_="dim", text_anchor="middle")


def _curve(line: Line, at: Scale, up: Scale) -> Iterable[Markup]:
    if not line.points:
        return
    if line.band:
        upper = [f"{at(x):g} {up(high):g}" for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
        lower = [f"{at(x):g} {up(low):g}" for (x, _), (low, _) in zip(line.points, line.band, strict=True)]
        yield tag("path", class_="band", d=f"M{'L'.join([*upper, *reversed(lower)])}Z")
    path = "M" + "L".join(f"{at(x):g} {up(y):g}" for x, y in line.points)
    yield tag("path", class_="line dashed" if line.dashed else "line", d=path)
    if line.dotted:
        for x, y in line.points:
            yield tag("circle", class_="dot", cx=at(x), cy=up(y), r=2.4)


def _legend(names: Sequence[str], left: float, top: float, width: float) -> Iterable[Markup]:
    for number, name in enumerate(names):
        x, y = left + number % 3 * (width - left) / 3, top + number // 3 * 17
        swatch = tag("rect", class_="bar", x=x, y=y + 3, width=14, height=4)
        yield group(_series(number), swatch, text(name, x + 19, y + 9))


def _series(number: int) -> str:
    return f"series-{number % SERIES}"


def _across(frame: Frame, y: float, kind: str) -> Markup:
    return tag("path", class_=kind, d=f"M{frame.left:g} {y:g}H{frame.right:g}")


def _room(texts: Iterable[str]) -> float:
    """That the longest of them needs; a short one may have wide letters alone."""
    longest = max(map(len, texts), default=0)
    return round(CHARACTER * longest + min(longest, 4) * 2, 1)
