"""From values to places: linear and logarithmic scales, their ticks, and labels that do not cover each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

LINE = 14  # height of a line of text
ROUND = (1, 1.5, 2, 3, 5, 7)  # in every decade, where a logarithmic axis may have a tick

Scale = Callable[[float], float]


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
