"""A profile as pictures: importance by layer, and the curves over the steps. Self-contained, no scripts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.profiles import RECORD_NAME, TENSORS_NAME, Floats, ProfileFile, summarise
from slipcast_compiler.host import publish as publishing
from slipcast_compiler.pages.page import render

CELL, LETTER = 14, 5.3  # in units of the heat map's view box
WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 150, 14, 40  # of the curves: their names stand to the right of them


def publish(profile: ProfileFile, output: Path) -> None:
    """A copy of the profile with its page, in one rename."""
    with publishing.workspace(output, RECORD_NAME) as folder:
        for name in (RECORD_NAME, TENSORS_NAME):
            shutil.copyfile(profile.folder / name, folder / name)
        (folder / "profile.html").write_text(render_page(profile), encoding="utf-8")
        publishing.publish(folder, output, RECORD_NAME)


def render_page(profile: ProfileFile) -> str:
    """profile.html."""
    return render("profile.html", s=summarise(profile), **figures(profile))


def figures(profile: ProfileFile) -> dict[str, Any]:
    """What the macros of profile.html draw: `heat`, by criterion, and `curves`."""
    steps = profile.group("steps")
    by_block = {block: curve for block, curve in profile.group("steps.feature_change").items() if len(curve)}
    gap = {"guidance gap": steps["guidance_gap"]} if len(steps["guidance_gap"]) else {}
    plots = curves(by_block, steps["timesteps"][1:]), curves(gap, steps["timesteps"])
    return {
        "heat": {name: heat_map(profile.group(f"head.{name}")) for name in profile.criteria("head")},
        "curves": [plot for plot in plots if plot],
    }


def heat_map(layers: Mapping[str, Floats]) -> dict[str, Any]:
    """A row of each layer, a cell of each head; `level` is its rank among all heads, 0 the least important, to 1.

    Ranks, since criteria differ in scale by orders of magnitude, and pruning goes by rank.
    """
    order = np.argsort(np.argsort(np.concatenate(list(layers.values())), kind="stable"))
    levels = iter((order / max(len(order) - 1, 1)).tolist())
    widest = max(map(len, layers.values()))
    left = round(LETTER * max(map(len, layers)))
    rows = [
        {
            "name": name, "y": i * CELL,
            "cells": [
                {"x": left + j * CELL, "level": round(next(levels), 3), "title": f"{name}, head {j}: {score:.4g}"}
                for j, score in enumerate(scores.tolist())
            ],
        }
        for i, (name, scores) in enumerate(layers.items())
    ]  # fmt: skip
    return {"rows": rows, "width": left + widest * CELL, "height": len(rows) * CELL, "cell": CELL}


def mask_map(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The heads that pruning kept (level 1) and removed (level 0), of layers as prune_heads reports them."""
    kept = {
        name: np.isin(np.arange(layer["heads"]), layer["kept"]).astype(np.float32) for name, layer in layers.items()
    }
    drawn = heat_map(kept)
    for row, levels in zip(drawn["rows"], kept.values(), strict=True):
        for head, (cell, level) in enumerate(zip(row["cells"], levels.tolist(), strict=True)):
            cell |= {"level": level, "title": f"{row['name']}, head {head}: {'kept' if level else 'removed'}"}
    return drawn


def curves(values: Mapping[str, Floats], timesteps: Floats) -> dict[str, Any] | None:
    """One line of each curve over the evaluations of the denoiser, in their order; None where there is nothing."""
    if not values:
        return None
    top = max(float(curve.max()) for curve in values.values()) or 1.0
    last = max(len(timesteps) - 1, 1)

    def x(i: int) -> float:
        return round(LEFT + i / last * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    lines = [
        {
            "name": name, "kind": i % 6, "dashed": i >= 6, "end": y(float(curve[-1])),
            "points": " ".join(f"{x(j)},{y(value)}" for j, value in enumerate(curve.tolist())),
        }
        for i, (name, curve) in enumerate(values.items())
    ]  # fmt: skip
    ticks = sorted({0, last // 2, last} & set(range(len(timesteps))))
    return {
        "lines": _labelled(lines), "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM, "x_ticks": [{"at": x(i), "label": f"{timesteps[i]:.0f}"} for i in ticks],
        "y_ticks": [{"at": y(value), "label": f"{value:.2g}"} for value in (0.0, top / 2, top)],
    }  # fmt: skip


def _labelled(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names at the right end of their lines, pushed apart where lines end close together."""
    ordered = sorted(lines, key=lambda line: line["end"])
    places = list(accumulate((line["end"] for line in ordered), lambda above, own: max(own, above + 13)))
    over = max(0.0, places[-1] - (HEIGHT - BOTTOM + 6))
    return [line | {"label_y": round(place - over, 1)} for line, place in zip(ordered, places, strict=True)]
