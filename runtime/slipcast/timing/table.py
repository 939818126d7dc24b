"""A profile on a terminal."""

from __future__ import annotations

import io
import shutil
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 140  # where there is no terminal to ask
OPERATORS, LAYERS = 10, 15  # the rest is in the JSON and in the page


def render_table(document: Mapping[str, Any]) -> str:
    """A headline, tables of components, operators and layers, and what has to be known to read them."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(file=io.StringIO(), width=max(width, 100), color_system=None, highlight=False)
    for line in headline(document):
        console.print(Text(line), soft_wrap=True)
    for table in (_components(document), _operators(document), _layers(document)):
        console.print(table)
    for note in document["notes"]:
        console.print(Text(f"note  {note}"), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def headline(d: Mapping[str, Any]) -> list[str]:
    """What ran, how long it took, and what the profiler itself costs."""
    versions = ", ".join(f"{name} {version}" for name, version in d["versions"].items())
    images = f"{d['num_images']} image{'s' if d['num_images'] > 1 else ''}"
    runs, over = d["runs"], d["runs"]["overheads"]
    turn = "in turn" if runs["in_turn"] else "all without before those with: there was no room for both"
    lines = [
        f"{d['name']} on {d['target']}: {images}, {len(d['steps'])} steps of {d['sampler']}, "
        f"{d['cpu_threads']} threads; {versions}",
        f"medians of {len(over)} runs, {turn}: {ms(d['without_profiler_s'])} without the profiler, "
        f"{ms(statistics.median(runs['with_profiler_s']))} with it ({d['profiler_overhead']:+.0%}, by pairs "
        f"{min(over):+.0%} to {max(over):+.0%}); the first run took {ms(d['first_run_s'])}",
    ]
    if seconds := [step["seconds"] for step in d["steps"]]:
        slowest = max(d["steps"], key=lambda step: step["seconds"])
        usual = ms(statistics.median(seconds))
        lines.append(f"a step: median {usual}, slowest {ms(slowest['seconds'])} (step {slowest['step']})")
    lines.append(f"memory: peak {d['memory']['peak_mb']:.0f} MB, {d['memory']['before_mb']:.0f} MB before loading")
    return lines


def ms(seconds: float) -> str:
    """Seconds, for people."""
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3f} s"


def megabytes(memory: Mapping[str, float] | None) -> tuple[str, str]:
    """What a component adds, and its peak."""
    return (f"{memory['added_mb']:.0f}", f"{memory['peak_mb']:.0f}") if memory else ("unknown", "unknown")


def where(layer: Mapping[str, Any]) -> str:
    """The module whose weights a layer holds, else the engine's name for it."""
    return str(layer["module"] or layer["name"])


def _components(d: Mapping[str, Any]) -> Table:
    columns = ["calls", "time", "share", "a call", "outside its layers", "adds MB", "peak MB"]
    table = _table("components", ["component"], columns)
    for each in d["components"]:
        table.add_row(
            each["name"],
            str(each["calls"]),
            ms(each["seconds"]),
            f"{each['share']:.1%}",
            ms(each["seconds"] / each["calls"]),
            f"{each['outside_layers_s'] / each['seconds']:.0%}",
            *megabytes(each["memory"]),
        )
    table.add_row("host", "", ms(d["host_s"]), f"{d['host_s'] / d['seconds']:.1%}", "", "", "", "")
    return table


def _operators(d: Mapping[str, Any]) -> Table:
    table = _table("operators that take most", ["component", "operator"], ["layers", "time", "share"])
    for each in d["operators"][:OPERATORS]:
        share = f"{each['seconds'] / d['seconds']:.1%}"
        table.add_row(each["component"], each["kind"], str(each["layers"]), ms(each["seconds"]), share)
    return table


def _layers(d: Mapping[str, Any]) -> Table:
    names = ["component", "layer", "operator", "kernel"]
    table = _table(
        "layers that take most, by the module whose weights they hold where that is known",
        names,
        ["time", "share", "a call"],
    )
    for each in d["layers"][:LAYERS]:
        table.add_row(
            *map(Text, (each["component"], where(each), each["kind"], each["kernel"])),
            ms(each["seconds"]),
            f"{each['seconds'] / d['seconds']:.1%}",
            ms(each["seconds"] / each["calls"]),
        )
    return table


def _table(title: str, names: list[str], numbers: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", header_style="")
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
