"""The benchmark as a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipcast_compiler.bench import plots
from slipcast_compiler.pages.page import render


def render_page(document: Mapping[str, Any], report: str | None = None) -> str:
    """HTML with the figures of the document and plots of them; no scripts, nothing from elsewhere.

    `report`: where the bundle's own page lies, as a URL relative to this one.
    """
    return render(
        "bench.html", d=document, report=report, scatter=plots.scatter(document), bars=plots.bars(document),
        stacks=plots.stacks(document), curve=plots.break_even(document), width=plots.WIDTH, height=plots.HEIGHT,
        left=plots.LEFT, right=plots.WIDTH - plots.RIGHT, bottom=plots.HEIGHT - plots.BOTTOM, margin=plots.RIGHT,
    )  # fmt: skip
