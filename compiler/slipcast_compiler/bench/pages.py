"""The benchmark as a self-contained page."""

from __future__ import annotations

from slipcast_compiler.bench import plots
from slipcast_compiler.bench.document import BenchDocument
from slipcast_compiler.pages.page import render


def render_page(document: BenchDocument, report: str | None = None) -> str:
    """HTML with the figures of the document and plots of them; no scripts, nothing from elsewhere.

    `report`: where the bundle's own page lies, as a URL relative to this one.
    """
    charts = {
        "scatter": plots.scatter(document),
        "memory": plots.memory(document),
        "components": plots.components(document),
        "break_even": plots.break_even(document),
    }
    names = plots.component_names(document)
    return render("bench.html", d=document, report=report, charts=charts, components=names)
