"""SVG text: elements, the style of charts, and a chart as a file of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable

from markupsafe import Markup

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
  .series-4 { color: var(--sky); } .series-5 { color: #e69f00; } .series-6 { color: var(--ink); }
  .series-7 { color: #7f7f7f; }
"""
ON_WHITE = {"ink": "#222", "dim": "#777", "line": "#ddd", "accent": "#0072b2", "bad": "#b3362b", "sky": "#56b4e9"}


def picture(width: float, height: float, parts: Iterable[Markup], label: str) -> Markup:
    """The chart; `label`: what it is, for those who cannot see it."""
    size: dict[str, str | float] = {"width": round(width), "height": round(height)}
    size["viewBox"] = f"0 0 {round(width)} {round(height)}"
    inner = Markup("\n") + Markup("\n").join(parts) + Markup("\n")
    return tag("svg", inner, **{"class_": "chart", "role": "img", "aria_label": label, **size})


def group(kind: str, *parts: Markup) -> Markup:
    """Parts of one class."""
    return tag("g", Markup("").join(parts), class_=kind)


def text(content: str, x: float, y: float, **attributes: str) -> Markup:
    """Nothing where it is empty."""
    return tag("text", content, x=x, y=y, **attributes) if content else Markup("")


def tooltip(content: str) -> Markup:
    """What a pointer on the element around it shows."""
    return tag("title", content) if content else Markup("")


def tag(name: str, content: str = "", /, **attributes: str | float) -> Markup:
    """An element; what is not Markup is escaped. class_ and text_anchor stand for class and text-anchor."""
    written = Markup("")
    for key, value in attributes.items():
        shown = value if isinstance(value, str) else f"{round(value, 3):g}"
        written += Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shown)
    return Markup("<{}{}>{}</{}>").format(name, written, content, name)


def as_file(chart: Markup) -> str:
    """The chart as a file of its own: with its colours, on white."""
    rules = re.sub(r"var\(--(\w+)\)", lambda match: ON_WHITE[match[1]], STYLE)
    begin, rest = str(chart).split(">", 1)
    begin = begin.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f'{begin}>\n<style>{rules}</style>\n<rect width="100%" height="100%" fill="#fff"/>{rest}\n'
