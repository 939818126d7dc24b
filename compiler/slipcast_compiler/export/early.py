"""What leaves the loop of an exported program: each denoiser is cut by binding time (graph/cut.py).

What a denoiser computes of its row of the table alone becomes the table. What it computes of the prompt is a component
that is called once for each prompt; what mixes both, such as the modulation of transformers by pooled text and
timestep, one that is called once for each prompt and step, whatever the number of images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from slipcast.bundle.driving import Column
from slipcast.bundle.program import Loop, Program, ProgramCall, Variant, rows_of_image
from slipcast.bundle.sources import NoiseSource
from slipcast.engines.onnxruntime import open_engine
from slipcast_compiler.export.component import contract_of
from slipcast_compiler.export.program import PROGRAM, TABLE
from slipcast_compiler.graph.cut import Binding, Parts, count_parameters, counts_images, cut
from slipcast_compiler.graph.weights import load, save_sharing

Arrays = dict[str, npt.NDArray[Any]]
DTYPES = (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32)  # that engines hand on
WORTH = 0.01  # of a denoiser's parameters: what has to leave the loop, for more inputs to pay


@dataclass
class _Rewriting:
    """Calls before, within and after a loop of slipcast's samplers, and those within where there is no guidance;
    without a loop all are before it. `places`: by place of a call of before, that of the last one in its stead. `once`:
    what is called once, and its outputs' values."""

    before: list[ProgramCall] = field(default_factory=list)
    loop: list[ProgramCall] = field(default_factory=list)
    unguided: list[ProgramCall] = field(default_factory=list)
    after: list[ProgramCall] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    once: dict[Any, dict[str, str]] = field(default_factory=dict)
    names: int = 0


def leave_loop(folder: Path) -> Program:
    """Rewrite the program that export_program left in `folder`: graphs, contracts, table and record, which is returned.
    Engines compute the same as before."""
    record = Program.model_validate_json((folder / PROGRAM).read_text())
    table: Arrays = load_file(folder / record.table) if record.table else {}
    calls = [(call, late) for variant in record.every for late in [_late(variant)] for call in variant.every_call]
    parts = dict[str, Parts]()
    laws = {name for variant in record.every if variant.loop for name in variant.loop.columns}
    for name in dict.fromkeys(call.component for call, _ in calls if call.component.startswith("denoiser")):
        own = [(call, late) for call, late in calls if call.component == name]
        if found := _cut(folder, name, own, laws if record.loop else None):
            parts[name] = found
            _write(folder, name, found, table, driven=record.loop is not None)
    if not parts:
        return record
    first, *others = (_rewrite(variant, parts) for variant in record.every)
    save_file(table, folder / TABLE) if table else (folder / TABLE).unlink(missing_ok=True)
    rest = [variant.model_copy(update=each) for variant, each in zip(record.variants, others, strict=True)]
    changed = record.model_copy(update={**first, "variants": tuple(rest), "table": TABLE if table else None})
    checked = Program.model_validate_json(changed.model_dump_json())
    (folder / PROGRAM).write_text(checked.model_dump_json())
    return checked


def _rewrite(variant: Variant, parts: Mapping[str, Parts]) -> dict[str, Any]:
    """Its calls, steps and loop, with the parts in place of the whole."""
    made, loop = _Rewriting(), variant.loop
    for place, call in enumerate(variant.calls):
        if call.component in parts:
            _add(made, call, parts[call.component], made.before, ())
        else:
            (made.after if loop and place >= loop.at else made.before).append(call)
        made.places[place] = len(made.before) - 1
    evaluations = [(made.loop, loop.calls), (made.unguided, loop.unguided)] if loop else []
    for into, inside in evaluations:
        for call in inside:
            if call.component in parts:
                _add(made, call, parts[call.component], into, loop.columns if loop else ())
            else:
                into.append(call)
    steps = tuple(made.places[place] for place in variant.steps)
    changed = loop and loop.model_copy(
        update={
            "at": len(made.before), "calls": tuple(made.loop), "unguided": tuple(made.unguided),
            "columns": _columns(loop, parts),
        }
    )  # fmt: skip
    return {"calls": (*made.before, *made.after), "steps": steps, "loop": changed}


def _columns(loop: Loop, parts: Mapping[str, Parts]) -> dict[str, Column]:
    """By input of a part what was the whole's."""
    found = {}
    for name, column in loop.columns.items():
        component, _, key = name.partition(".")
        if component not in parts:
            found[name] = column
            continue
        for part, model in parts[component].graphs.items():
            if key in (str(value.name) for value in model.graph.inputs):
                found[f"{_component(component, part)}.{key}"] = column
    return found


def _late(variant: Variant) -> set[str]:
    """The values that depend on noise."""
    late = {source.value for source in variant.sources if isinstance(source, NoiseSource)}
    if variant.loop:
        late.add(variant.loop.sample)
    for call in variant.every_call:
        if late.intersection(call.inputs.values()):
            late.update(call.outputs.values())
    return late


def _cut(
    folder: Path, name: str, calls: Sequence[tuple[ProgramCall, set[str]]], laws: Collection[str] | None
) -> Parts | None:
    """The parts of a denoiser, or None where it stays whole. `calls`: all of it, with what is late then; `laws`: the
    inputs that a run computes for each step, where those of the table are the same at all; else they are the step's."""
    model = load(folder / f"{name}.onnx")
    if len(list(model.graphs())) > 1:  # a branch or a loop within the graph
        return None
    inputs = {}
    for value in model.graph.inputs:
        key = str(value.name)
        if key not in calls[0][0].inputs:
            if laws is None or f"{name}.{key}" in laws:
                inputs[key] = Binding.STEP
        elif any(call.inputs[key] in late for call, late in calls):
            inputs[key] = Binding.LATENT
    parts = cut(model, inputs=inputs)
    crossing = [value for part, each in parts.graphs.items() if part != "denoise" for value in each.graph.outputs]
    left = 1 - count_parameters(parts.graphs["denoise"].graph) / max(parts.parameters, 1)
    whole = left < WORTH or parts.telling
    return None if whole or not all(value.dtype in DTYPES and _has_rows(value) for value in crossing) else parts


def _has_rows(value: ir.Value) -> bool:
    """Whether a runtime can tell those of an image: they are counted by the first dimension, or not at all."""
    if value.shape is None or any(not isinstance(size, int) and size.value is None for size in value.shape):
        return False
    first = [size if isinstance(size, int) else str(size.value) for size in value.shape[:1]]
    return not counts_images(value.shape if not rows_of_image(first) else value.shape[1:])


def _write(folder: Path, name: str, parts: Parts, table: Arrays, driven: bool) -> None:
    """Graphs and contracts in place of the denoiser's; the step's outputs, at every row, into the table. Where a run
    chooses its steps (`driven`) what depends on them alone stays a component."""
    rows = {key.removeprefix(f"{name}."): table.pop(key) for key in list(table) if key.startswith(f"{name}.")}
    with tempfile.TemporaryDirectory(prefix=".parts-", dir=folder) as made:  # all read the weights of the whole
        scratch = Path(made)
        for part, model in parts.graphs.items():
            save_sharing(model, scratch / f"{_component(name, part)}.onnx")
        if "step" in parts.graphs and not driven:
            file = scratch / f"{_component(name, 'step')}.onnx"
            rows |= _evaluate(file, rows)
            file.unlink()
        for file in scratch.iterdir():
            file.replace(folder / file.name)
    for part, model in parts.graphs.items():
        if part != "step" or driven:
            component = _component(name, part)
            (folder / f"{component}.json").write_text(contract_of(model).model_dump_json())
            taken = (str(value.name) for value in model.graph.inputs)
            table |= {f"{component}.{key}": rows[key] for key in taken if key in rows}


def _component(name: str, part: str) -> str:
    return name + {"denoise": ""}.get(part, f"_{part.replace('+', '_')}")


def _evaluate(step: Path, rows: Arrays) -> Arrays:
    """By output, stacked [rows, ...], in fp32."""
    with open_engine(step, None, "fp32") as engine:
        taken = [spec.name for spec in engine.inputs]
        count = len(next(iter(rows.values())))
        found = [engine({key: rows[key][row, ...] for key in taken}) for row in range(count)]
    return {key: np.stack([each[key] for each in found]) for key in found[0]}


def _add(made: _Rewriting, call: ProgramCall, parts: Parts, into: list[ProgramCall], columns: Collection[str]) -> None:
    """The calls in place of one of the whole, which go `into` these; what prompts alone decide goes before the loop.
    `columns`: the inputs that neither a value nor the table gives."""
    known, driven = dict(call.inputs), into is not made.before
    for part in ("step", "prompt", "prompt+step", "denoise"):
        if (model := parts.graphs.get(part)) is None or (part == "step" and not driven):
            continue
        taken = [str(value.name) for value in model.graph.inputs]
        inputs = {key: known[key] for key in taken if key in known}
        tabled = [key for key in taken if key not in inputs and f"{call.component}.{key}" not in columns]
        row = call.row if tabled else None
        component, outputs = _component(call.component, part), dict(call.outputs)
        if part != "denoise":
            key = component, tuple(sorted(inputs.items())), row
            if key in made.once:
                known |= made.once[key]
                continue
            outputs = {str(value.name): f"c{made.names}_{at}" for at, value in enumerate(model.graph.outputs)}
            made.names += 1
            made.once[key] = outputs
            known |= outputs
        made_call = ProgramCall(component=component, inputs=inputs, outputs=outputs, row=row)
        (made.before if part == "prompt" else into).append(made_call)
