"""Icicle pictures (flame graphs upside down): what contains lies above what it contains, and widths are time.

After B. Gregg, "The Flame Graph", ACM Queue 14(2), 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, ROW = 1360, 26
CHARACTER, INSET = 6.9, 5  # of the labels' type
NARROWEST = 1.0  # what is narrower shares a block with its neighbours


@dataclass(frozen=True)
class Block:
    """`tone`: a class of the page's style. The seconds of `parts` that fall short of its own stay blank below it."""

    label: str
    seconds: float
    tone: str
    detail: str = ""
    parts: tuple[Block, ...] = ()


def draw(root: Block, title: str) -> str:
    """An SVG element of `WIDTH` units, the root as wide as that."""
    shapes = _shapes(root, 0.0, WIDTH / root.seconds, 0, root.seconds)
    height = ROW * _depth(root)
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, *shapes, "</svg>"])


def _depth(block: Block) -> int:
    return 1 + max(map(_depth, block.parts), default=0)


def _shapes(block: Block, x: float, scale: float, depth: int, whole: float) -> list[str]:
    width, y = block.seconds * scale, depth * ROW
    title = " · ".join(filter(None, [block.label, block.detail, _time(block.seconds, whole)]))
    room = int((width - 2 * INSET) / CHARACTER)
    label = block.label if len(block.label) <= room else block.label[: room - 1] + "…" if room >= 5 else ""
    lines = [
        f'<g class="{block.tone}"><title>{escape(title)}</title>'
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}"/>'
        + (f'<text x="{x + INSET:.2f}" y="{y + 17}">{escape(label)}</text>' if label else "")
        + "</g>"
    ]
    inside = sum(part.seconds for part in block.parts)
    if inside > block.seconds:  # layers that ran side by side: drawn as shares of the time they had
        scale *= block.seconds / inside
    for part in _merged(block.parts, NARROWEST / scale):
        lines += _shapes(part, x, scale, depth + 1, whole)
        x += part.seconds * scale
    return lines


def _merged(parts: Sequence[Block], least: float) -> list[Block]:
    """Neighbours of one tone that are too narrow to be seen become one block."""
    merged: list[Block] = []
    count = 0
    for part in parts:
        if part.seconds >= least:
            merged.append(part)
            count = 0
        elif count and merged[-1].tone == part.tone:
            count += 1
            seconds = merged[-1].seconds + part.seconds
            merged[-1] = replace(merged[-1], label=f"{count} small ones", seconds=seconds, detail="", parts=())
        else:
            merged.append(part)
            count = 1
    return merged


def _time(seconds: float, whole: float) -> str:
    return f"{seconds * 1e3:.3g} ms, {seconds / whole:.1%} of the run"
