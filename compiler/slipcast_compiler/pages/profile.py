"""A profile as pictures: importance by layer, and the curves over the steps. Self-contained, no scripts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from slipcast.bundle.profiles import RECORD_NAME, TENSORS_NAME, Floats, ProfileFile, summarise
from slipcast_compiler.host import publish as publishing
from slipcast_compiler.pages.charts import Axis, Cell, Line, heat_map, line_plot
from slipcast_compiler.pages.page import render

COLOURS = 6  # of curves; those after them are dashed


@dataclass(frozen=True)
class Figures:
    """`heat`: importance of heads by criterion; `changes` and `gap`: curves over the steps, where there are any."""

    heat: dict[str, Markup]
    changes: Markup | None
    gap: Markup | None


def publish(profile: ProfileFile, output: Path) -> None:
    """A copy of the profile with its page, in one rename."""
    with publishing.workspace(output, RECORD_NAME) as folder:
        for name in (RECORD_NAME, TENSORS_NAME):
            shutil.copyfile(profile.folder / name, folder / name)
        (folder / "profile.html").write_text(render_page(profile), encoding="utf-8")
        publishing.publish(folder, output, RECORD_NAME)


def render_page(profile: ProfileFile) -> str:
    """profile.html."""
    return render("profile.html", s=summarise(profile), figures=figures(profile))


def figures(profile: ProfileFile) -> Figures:
    """What the pages draw of it."""
    heat = {name: importance_map(profile.group(f"head.{name}"), name) for name in profile.criteria("head")}
    if not (steps := profile.group("steps")):
        return Figures(heat, None, None)
    by_block = {block: curve for block, curve in profile.group("steps.feature_change").items() if len(curve)}
    gap = {"guidance gap": steps["guidance_gap"]} if len(steps["guidance_gap"]) else {}
    return Figures(
        heat,
        curves(by_block, steps["timesteps"][1:], "change of features from step to step"),
        curves(gap, steps["timesteps"], "guidance gap over the steps"),
    )


def importance_map(layers: Mapping[str, Floats], criterion: str) -> Markup:
    """A row of each layer, a cell of each head, the stronger the higher its score ranks among all."""
    rows = {
        name: [
            Cell(level, f"{name}, head {head}: {score:.4g}")
            for head, (level, score) in enumerate(zip(levels, layers[name].tolist(), strict=True))
        ]
        for name, levels in ranked(layers).items()
    }
    return heat_map(rows, f"importance of heads by {criterion}")


def ranked(layers: Mapping[str, Floats]) -> dict[str, list[float]]:
    """The rank of each score among those of all layers, 0 the least to 1.

    Ranks, since criteria differ in scale by orders of magnitude, and pruning goes by rank.
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate(list(layers.values())), method="ordinal") - 1
    split = np.split(ranks / max(len(ranks) - 1, 1), np.cumsum([len(scores) for scores in layers.values()])[:-1])
    return {name: levels.tolist() for name, levels in zip(layers, split, strict=True)}


def pass_figures(reports: Mapping[str, Any]) -> dict[str, Any]:
    """What pages show of the passes' reports: the columns of each pass's table, and the picture of the heads that are
    kept."""
    tables = {name: told["layers"] for name, told in reports.items() if isinstance(told.get("layers"), dict)}
    columns = {name: list(dict.fromkeys(key for row in rows.values() for key in row)) for name, rows in tables.items()}
    heads = reports.get("prune_heads")
    return {"columns": columns, "masks": heads and mask_map(heads["layers"])}


def mask_map(layers: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The heads that pruning kept and removed, of layers as prune_heads reports them."""

    def cells(name: str, heads: int, kept: Sequence[int]) -> list[Cell]:
        return [Cell(float(i in kept), f"{name}, head {i}: {'kept' if i in kept else 'removed'}") for i in range(heads)]

    rows = {name: cells(name, layer["heads"], layer["kept"]) for name, layer in layers.items()}
    return heat_map(rows, "heads that are kept")


def curves(values: Mapping[str, Floats], timesteps: Floats, label: str) -> Markup | None:
    """One line of each curve over the evaluations of the denoiser, in their order; None where there is nothing."""
    if not values:
        return None
    lines = [
        Line(name, list(enumerate(curve.tolist())), kind=f"series-{i % COLOURS}", dashed=i >= COLOURS)
        for i, (name, curve) in enumerate(values.items())
    ]
    last = len(timesteps) - 1
    x = Axis(
        [0, last],
        label="timestep",
        ticks=sorted({0, last // 2, last} & set(range(len(timesteps)))),
        form=lambda evaluation: f"{timesteps[int(evaluation)]:.0f}",
    )
    return line_plot(lines, x, Axis([0.0, max(float(curve.max()) for curve in values.values())]), label)
