"""Charts as SVG: a caller says what is drawn, and here is where it comes to stand.

Colours are classes, whose rules are STYLE: of a page that includes it, or of a picture that stands alone (`as_file`).
Margins follow the texts, so that no label leaves its picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from markupsafe import Markup

PLOT_WIDTH, PLOT_HEIGHT, PANEL_WIDTH = 430, 240, 270
CHARACTER, LINE = 6.6, 14  # width of a character, on the mean, and height of a line, at 12 pixels
GAP = 14  # between panels, and around what would touch an edge
ROW, CELL = 26, 18
BARS_WIDTH = 400
ROUND = (1, 1.5, 2, 3, 5, 7)  # in every decade, where a logarithmic axis may have a tick
SERIES = 8

# Okabe and Ito's palette, which colour-blind readers can tell apart, with the page's own blue and black.
STYLE = """
  .chart { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; } .chart text { fill: var(--ink); }
  .chart .dim { fill: var(--dim); } .chart .name { font-weight: bold; }
  .chart .title { font-size: 14px; font-weight: bold; }
  .chart .axis { fill: none; stroke: var(--dim); } .chart .grid { stroke: var(--line); }
  .chart .zero { stroke: var(--dim); } .chart .limit { stroke: var(--bad); stroke-dasharray: 5 4; }
  .chart .whisker { stroke: var(--dim); stroke-opacity: .5; }
  .chart .line { fill: none; stroke: currentColor; stroke-width: 1.8; } .chart .dashed { stroke-dasharray: 5 3; }
  .chart .leader { stroke: currentColor; stroke-opacity: .6; stroke-dasharray: 2 3; }
  .chart .band { fill: currentColor; fill-opacity: .13; } .chart :is(.dot, .bar) { fill: currentColor; }
  .chart .cell { fill: var(--accent); stroke: var(--line); stroke-width: .5; } .own .line { stroke-width: 2.5; }
  .own, .series-0 { color: var(--accent); } .other { color: var(--dim); }
  .series-1 { color: #d55e00; } .series-2 { color: #009e73; } .series-3 { color: #cc79a7; }
  .series-4 { color: #56b4e9; } .series-5 { color: #e69f00; } .series-6 { color: var(--ink); }
  .series-7 { color: #7f7f7f; }
"""
ON_WHITE = {"ink": "#222", "dim": "#777", "line": "#ddd", "accent": "#0072b2", "bad": "#b3362b"}

Scale = Callable[[float], float]


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


# --- scales and ticks ------------------------------------------------------------------------------------------------


def linear(low: float, high: float, begin: float, end: float) -> Scale:
    """low to begin, high to end."""
    width = high - low or 1.0
    return lambda value: round(begin + (value - low) / width * (end - begin), 1)


def logarithmic(low: float, high: float, begin: float, end: float, margin: float = 0.0) -> Scale:
    """The same of positive values, with `margin` of the range to spare at both ends."""
    inner = linear(*spaced(math.log10(low), math.log10(high), margin), begin, end)
    return lambda value: inner(math.log10(value))


def spaced(low: float, high: float, margin: float) -> tuple[float, float]:
    """The range, wider by its share `margin` at both ends."""
    spare = margin * ((high - low) or 1.0)
    return low - spare, high + spare


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, some five of them."""
    rough = max(high - low, 1e-6) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, for a logarithmic axis; at least one."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in ROUND]
    inside = [float(f"{tick:.3g}") for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside or [float(f"{low:.2g}")]


def pushed_apart(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """Lines of text near `places`, none on another, and none beyond top or bottom as long as there is room."""
    gap = min(LINE, (bottom - top) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    down = list(accumulate((max(places[i], top) for i in order), lambda above, own: max(own, above + gap)))
    up = list(accumulate((min(y, bottom) for y in reversed(down)), lambda below, own: min(own, below - gap)))
    found = dict(zip(reversed(order), up, strict=True))
    return [round(found[i], 1) for i in range(len(places))]


# --- charts ----------------------------------------------------------------------------------------------------------


def line_plot(lines: Sequence[Line], x: Axis, y: Axis, label: str) -> Markup:
    """Lines with their names at their ends. `label`: what the picture is, for those who cannot see it."""
    frame, width = _framed(y, [line.name for line in lines])
    at, up = x.scale(frame.left, frame.right), y.scale(frame.bottom, frame.top)
    ends = [(at(line.points[-1][0]), up(line.points[-1][1])) for line in lines]
    places = pushed_apart([end[1] for end in ends], frame.top, frame.bottom)
    drawn = list(_axes(frame, x, y))
    for number, (line, (end_x, end_y), place) in enumerate(zip(lines, ends, places, strict=True)):
        leader = _tag("path", class_="leader", d=f"M{end_x + 3:g} {end_y:g}L{frame.right + 16:g} {place:g}")
        name = _text(line.name, frame.right + 20, place + 4)
        drawn.append(_group(line.kind or _series(number), *_curve(line, at, up), leader, name))
    return _svg(width, _height(frame, x), drawn, label)


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
            parts.append(_tag("path", class_="whisker", d=f"M{left} {top}V{up(dot.end)}"))
        parts.append(_tag("circle", _titled(dot.title), class_="dot", cx=left, cy=top, r=dot.radius))
        if dot.label:
            parts.append(_text(dot.label, left + 9, place + 4))
        drawn.append(_group(dot.kind, *parts))
    return _svg(width, _height(frame, x), drawn, label)


def panels(title: str, panels: Mapping[str, Sequence[Line]], x: Axis, y: Axis) -> Markup:
    """Lines in one panel of each name, side by side with the same axes, and a legend below them."""
    names = list(dict.fromkeys(line.name for panel in panels.values() for line in panel))
    left, top = _room([y.form(tick) for tick in y.marks]) + 14, 54
    width = left + len(panels) * (PANEL_WIDTH + GAP)
    frame = Frame(left, top, left + PANEL_WIDTH, top + PLOT_HEIGHT)
    drawn = [_text(title, left, 18, class_="title")]
    for number, (name, panel) in enumerate(panels.items()):
        here = frame._replace(left=left + number * (PANEL_WIDTH + GAP))
        here = here._replace(right=here.left + PANEL_WIDTH)
        at, up = x.scale(here.left + GAP, here.right - GAP), y.scale(here.bottom, here.top)
        drawn += [_text(name, here.left + 8, top - 10, class_="name"), *_axes(here, x, y, at, first=number == 0)]
        drawn += [_group(line.kind or _series(names.index(line.name)), *_curve(line, at, up)) for line in panel]
    bottom = _height(frame, x) + 8
    drawn += _legend(names, left, bottom, width)
    return _svg(width, bottom + 17 * math.ceil(len(names) / 3) + 6, drawn, title)


def bars(rows: Sequence[Bar], label: str, *, shown: bool = False) -> Markup:
    """A row of each bar, the longest as long as there is room; `shown`: with the label as its title above them."""
    left, right = _room([row.name for row in rows]) + 8, _room([row.label for row in rows]) + 6
    top = 26 if shown else 0
    width = max(left + BARS_WIDTH + right, _room([label]) + 2 * GAP if shown else 0)
    scale = linear(0.0, max(sum(piece.value for piece in row.pieces) for row in rows), 0.0, BARS_WIDTH)
    drawn = [_text(label, 8, 18)] if shown else []
    for number, row in enumerate(rows):
        y, end = top + number * ROW, left
        drawn.append(_text(row.name, left - 8, y + 16, text_anchor="end"))
        for piece in row.pieces:
            shape = _tag(
                "rect", _titled(piece.title), class_="bar", x=end, y=y + 4, width=scale(piece.value), height=16
            )
            drawn.append(_group(piece.kind, shape))
            end += scale(piece.value)
        drawn.append(_text(row.label, end + 6, y + 16))
    return _svg(width, top + ROW * len(rows), drawn, label)


def heat_map(rows: Mapping[str, Sequence[Cell]], label: str) -> Markup:
    """A row of each name; the higher its level, the stronger a cell's colour."""
    left, drawn = _room(rows), []
    for number, (name, cells) in enumerate(rows.items()):
        drawn.append(_text(name, 0, number * CELL + 13))
        for column, cell in enumerate(cells):
            place = {"x": left + column * CELL, "y": number * CELL, "width": CELL, "height": CELL}
            level = round(cell.level, 3)
            drawn.append(_tag("rect", _titled(cell.title), class_="cell", fill_opacity=level, **place))
    return _svg(left + CELL * max(map(len, rows.values())), CELL * len(rows), drawn, label)


def as_file(chart: Markup) -> str:
    """The chart as a file of its own: with its colours, on white."""
    rules = re.sub(r"var\(--(\w+)\)", lambda match: ON_WHITE[match[1]], STYLE)
    begin, rest = str(chart).split(">", 1)
    begin = begin.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f'{begin}>\n<style>{rules}</style>\n<rect width="100%" height="100%" fill="#fff"/>{rest}\n'


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
            yield _text(y.form(tick), frame.left - 6, up(tick) + 4, text_anchor="end")
    for tick in x.marks:
        yield _tag("path", class_="axis", d=f"M{at(tick):g} {frame.bottom:g}v4")
        yield _text(x.form(tick), at(tick), frame.bottom + 17, text_anchor="middle")
    if x.label:
        middle = (frame.left + frame.right) / 2
        yield _text(x.label, middle, frame.bottom + 33, class_="dim", text_anchor="middle")


def _curve(line: Line, at: Scale, up: Scale) -> Iterable[Markup]:
    if not line.points:
        return
    if line.band:
        upper = [f"{at(x):g} {up(high):g}" for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
        lower = [f"{at(x):g} {up(low):g}" for (x, _), (low, _) in zip(line.points, line.band, strict=True)]
        yield _tag("path", class_="band", d=f"M{'L'.join([*upper, *reversed(lower)])}Z")
    path = "M" + "L".join(f"{at(x):g} {up(y):g}" for x, y in line.points)
    yield _tag("path", class_="line dashed" if line.dashed else "line", d=path)
    if line.dotted:
        for x, y in line.points:
            yield _tag("circle", class_="dot", cx=at(x), cy=up(y), r=2.4)


def _legend(names: Sequence[str], left: float, top: float, width: float) -> Iterable[Markup]:
    for number, name in enumerate(names):
        x, y = left + number % 3 * (width - left) / 3, top + number // 3 * 17
        swatch = _tag("rect", class_="bar", x=x, y=y + 3, width=14, height=4)
        yield _group(_series(number), swatch, _text(name, x + 19, y + 9))


def _series(number: int) -> str:
    return f"series-{number % SERIES}"


def _across(frame: Frame, y: float, kind: str) -> Markup:
    return _tag("path", class_=kind, d=f"M{frame.left:g} {y:g}H{frame.right:g}")


def _room(texts: Iterable[str]) -> float:
    """That the longest of them needs; a short one may have wide letters alone."""
    longest = max(map(len, texts), default=0)
    return round(CHARACTER * longest + min(longest, 4) * 2, 1)


def _svg(width: float, height: float, parts: Iterable[Markup], label: str) -> Markup:
    size: dict[str, str | float] = {"width": round(width), "height": round(height)}
    size["viewBox"] = f"0 0 {round(width)} {round(height)}"
    inner = Markup("\n") + Markup("\n").join(parts) + Markup("\n")
    return _tag("svg", inner, **{"class_": "chart", "role": "img", "aria_label": label, **size})


def _group(kind: str, *parts: Markup) -> Markup:
    return _tag("g", Markup("").join(parts), class_=kind)


def _text(text: str, x: float, y: float, **attributes: str) -> Markup:
    return _tag("text", text, x=x, y=y, **attributes) if text else Markup("")


def _titled(title: str) -> Markup:
    return _tag("title", title) if title else Markup("")


def _tag(name: str, content: str = "", /, **attributes: str | float) -> Markup:
    """An element; what is not Markup is escaped. class_ and text_anchor stand for class and text-anchor."""
    written = Markup("")
    for key, value in attributes.items():
        shown = value if isinstance(value, str) else f"{round(value, 3):g}"
        written += Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shown)
    return Markup("<{}{}>{}</{}>").format(name, written, content, name)
