"""A profile as one self-contained page: two pictures, and tables beside them. No scripts, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from slipcast.timing.flame import Block, draw
from slipcast.timing.table import headline, megabytes, ms, where

LAYERS = 40
TONES = 8  # distinct colours for the largest; the rest is grey

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2228; --dim: #66707b; --line: #d9dee4; --paper: #fff;
  --rest: #e3e7eb; --none: #f4f6f8; --t0: #9ec5ee; --t1: #f3c08a; --t2: #a9d8a4; --t3: #e6abc4; --t4: #c5b8ec;
  --t5: #e8dc88; --t6: #8fd3d1; --t7: #e5a99d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #98a2ad; --line: #363d45; --paper: #16191d;
  --rest: #3a424b; --none: #1f2429; --t0: #2f5f93; --t1: #85581f; --t2: #35703a; --t3: #84405f; --t4: #584a94;
  --t5: #6f6519; --t6: #1f6f6d; --t7: #85443a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 88rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); }
.scroll { overflow-x: auto; } svg { display: block; width: 100%; min-width: 60rem; height: auto; }
svg text { font: 12px ui-monospace, monospace; fill: var(--ink); pointer-events: none; }
rect { stroke: var(--paper); stroke-width: .6; } g:hover > rect { stroke: var(--ink); stroke-width: 1.5; }
.rest rect { fill: var(--rest); } .none rect { fill: var(--none); } .none text { fill: var(--dim); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; } td { font-size: 14px; overflow-wrap: anywhere; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr > :last-child { padding-right: 0; }
""" + "\n".join(f".t{i} rect {{ fill: var(--t{i}); }}" for i in range(TONES))


def render_page(document: Mapping[str, Any]) -> str:
    """HTML of a profile's document; everything that comes from the bundle is escaped."""
    title = escape(f"{document['name']}: where a run spends its time")
    what = [] if document["prompt"] is None else [f"“{document['prompt']}”"]
    lines = "".join(f"<p>{escape(line)}</p>" for line in [*what, *headline(document)])
    notes = "".join(f'<p class="dim">{escape(note)}</p>' for note in document["notes"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{lines}
<h2>In the order of time</h2>
<p class="dim">The run; below it its sampling steps; below them the calls of engines. Hover for figures.</p>
<div class="scroll">{draw(_timeline(document), "the run in the order of time")}</div>
<h2>By what takes most</h2>
<p class="dim">The run; its components; their operators, a colour each; then the parts of the
network and layers, all calls of a run together.</p>
<div class="scroll">{draw(_by_layer(document), "the run by component, operator and layer")}</div>
<h2>Components</h2>
{_components(document)}
<h2>Operators</h2>
{_operators(document)}
<h2>The {min(LAYERS, len(document["layers"]))} layers that take most</h2>
{_layers(document)}
<h2>How to read this</h2>
{notes}
</body>
</html>
"""


def _timeline(d: Mapping[str, Any]) -> Block:
    """The run, then steps and what lies around them, then calls; what is left between them is the host's."""
    tones = {component["name"]: f"t{i % TONES}" for i, component in enumerate(d["components"])}
    calls = [(call["component"], call["begin_s"], call["end_s"]) for call in d["timeline"]]
    parts: list[Block] = []
    now = 0.0
    for step in [*d["steps"], None]:
        begin, end = (step["begin_s"], step["begin_s"] + step["seconds"]) if step else (d["seconds"], d["seconds"])
        parts += _calls([call for call in calls if now <= call[1] < begin], now, begin, tones)
        if step:
            inside = _calls([call for call in calls if begin <= call[1] < end], begin, end, tones)
            label, detail = str(step["step"]), "" if step["timestep"] is None else f"timestep {step['timestep']:g}"
            parts.append(Block(f"step {label}" if len(d["steps"]) < 20 else label, end - begin, "rest", detail, inside))
        now = end
    return Block(f"one run: {ms(d['seconds'])}", d["seconds"], "rest", "", tuple(parts))


def _calls(
    calls: Sequence[tuple[str, float, float]], begin: float, end: float, tones: Mapping[str, str]
) -> tuple[Block, ...]:
    blocks = []
    for name, start, stop in calls:
        blocks += [_host(start - begin), Block(name, stop - start, tones[name])]
        begin = stop
    return (*blocks, _host(end - begin))


def _host(seconds: float) -> Block:
    """A difference of means, which may come out below nothing."""
    return Block("host", max(seconds, 0.0), "none")


def _by_layer(d: Mapping[str, Any]) -> Block:
    kinds: dict[str, float] = {}
    for operator in d["operators"]:
        kinds[operator["kind"]] = kinds.get(operator["kind"], 0.0) + operator["seconds"]
    tones = {kind: f"t{i}" for i, kind in enumerate(sorted(kinds, key=lambda kind: -kinds[kind])[:TONES])}
    parts = []
    for component in sorted(d["components"], key=lambda component: -component["seconds"]):
        blocks = []
        for operator in d["operators"]:
            if operator["component"] == component["name"]:
                tone = tones.get(operator["kind"], "rest")
                layers = [
                    each
                    for each in d["layers"]
                    if (each["component"], each["kind"]) == (operator["component"], operator["kind"])
                ]
                parts_of_it, detail = _by_place(layers, tone), f"{len(layers)} layers"
                blocks.append(Block(operator["kind"], operator["seconds"], tone, detail, parts_of_it))
        outside = Block("outside layers", max(component["outside_layers_s"], 0.0), "none")
        label = f"{component['name']} {ms(component['seconds'])}, {component['share']:.0%}"
        parts.append(Block(label, component["seconds"], "rest", "", (*blocks, outside)))
    host = replace(_host(d["host_s"]), detail="outside the engines")
    return Block(f"one run: {ms(d['seconds'])}", d["seconds"], "rest", "", (*parts, host))


def _by_place(layers: Sequence[Mapping[str, Any]], tone: str) -> tuple[Block, ...]:
    """Layers of one kind; together where their modules stand in the same block of the network."""
    places: dict[str, list[Block]] = {}
    for each in layers:
        block = Block(where(each), each["seconds"], tone, f"{each['name']}, {each['kernel']}")
        place = re.match(r".*?\.\d+(?=\.)", each["module"])  # down_blocks.0 of down_blocks.0.resnets.1.conv1
        places.setdefault(place[0] if place else block.label, []).append(block)
    blocks = [
        Block(place, sum(part.seconds for part in parts), tone, f"{len(parts)} layers", tuple(parts))
        if len(parts) > 1
        else parts[0]
        for place, parts in places.items()
    ]
    return tuple(sorted(blocks, key=lambda block: -block.seconds))


def _components(d: Mapping[str, Any]) -> str:
    rows = [
        [
            each["name"],
            str(each["calls"]),
            ms(each["seconds"]),
            f"{each['share']:.1%}",
            ms(each["outside_layers_s"]),
            *megabytes(each["memory"]),
        ]
        for each in d["components"]
    ]
    rows.append(["host", "", ms(d["host_s"]), f"{d['host_s'] / d['seconds']:.1%}", "", "", ""])
    return _table(["component"], ["calls", "time", "share", "outside its layers", "adds MB", "peak MB"], rows)


def _operators(d: Mapping[str, Any]) -> str:
    rows = [
        [
            each["component"],
            each["kind"],
            str(each["layers"]),
            ms(each["seconds"]),
            f"{each['seconds'] / d['seconds']:.1%}",
        ]
        for each in d["operators"]
        if each["seconds"] >= d["seconds"] / 1000
    ]
    return _table(["component", "operator"], ["layers", "time", "share"], rows)


def _layers(d: Mapping[str, Any]) -> str:
    rows = [
        [
            *(each[key] for key in ("component", "name", "module", "kind", "kernel")),
            ms(each["seconds"]),
            f"{each['seconds'] / d['seconds']:.1%}",
            ms(each["seconds"] / each["calls"]),
        ]
        for each in d["layers"][:LAYERS]
    ]
    return _table(["component", "layer", "module", "operator", "kernel"], ["time", "share", "a call"], rows)


def _table(names: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        sides = [""] * len(names) + [' class="n"'] * len(numbers)
        inside = "".join(f"<{tag}{side}>{escape(cell)}</{tag}>" for cell, side in zip(cells, sides, strict=True))
        return f"<tr>{inside}</tr>"

    return "\n".join(
        [
            '<div class="scroll"><table>',
            row([*names, *numbers], "th"),
            *(row(cells, "td") for cells in rows),
            "</table></div>",
        ]
    )
