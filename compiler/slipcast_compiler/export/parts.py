"""Parts of a denoiser that was cut, as a bundle has them: for the loop, for the prompt, and a table of timesteps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save

from slipcast.bundle.manifest import Component, Cut, Sampling
from slipcast.engines.onnxruntime import open_engine
from slipcast.run.step_table import evaluated_timesteps
from slipcast_compiler.export.component import contract_of
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.graph.cut import Binding, count_parts, cut
from slipcast_compiler.graph.tidy import constant
from slipcast_compiler.graph.weights import load, save_sharing
from slipcast_compiler.host.cache import Cache

COMPONENTS = {"denoise": "denoiser", "prompt": "denoiser_prompt", "step": "denoiser_step"}
STEP_TABLE, FIGURES = "steps.safetensors", "cut.json"


def cut_denoiser(graphs: Graphs, general: bool, cache: Cache) -> Graphs:
    """With the denoiser's parts in its place; `general`: for timesteps other than the schedule's, too."""
    components = export_parts(graphs.components["denoiser"], general, cache)
    step = components["denoiser"]
    return graphs.add(components, {"cut": json.loads((step / FIGURES).read_text())}, step=step)


def export_parts(exported: Path, general: bool, cache: Cache) -> dict[str, Path]:
    """By component, the cache's directory with NAME.onnx, its weights and NAME.json, as export_component has it."""

    def make(folder: Path) -> None:
        # The runtime has no place yet for what is computed once per prompt and step: that stays in the loop.
        parts = cut(load(exported / "denoiser.onnx"), (Binding.STEP, Binding.PROMPT))
        figures = count_parts(parts)
        _pack(parts.graphs["step"].graph, parts.graphs["denoise"].graph)
        for name, model in parts.graphs.items():
            component = COMPONENTS[name]
            save_sharing(model, folder / f"{component}.onnx")
            (folder / f"{component}.json").write_text(contract_of(model).model_dump_json())
        (folder / FIGURES).write_text(json.dumps(figures))

    folder = cache.get("parts", {"source": exported.name}, make)
    shipped = [name for name in COMPONENTS.values() if (folder / f"{name}.json").is_file()]
    return {name: folder for name in shipped if name != "denoiser_step" or general}


def _pack(step: ir.Graph, loop: ir.Graph) -> None:
    """One row for all that the loop takes of a timestep: handing a tensor to an engine costs as much as a layer does.

    The row is float32 [1, n]: what the step graph has computed, one after the other.
    """
    parts, taken = list(step.outputs), {value.name: value for value in loop.inputs}
    sizes = [math.prod(part.shape.numpy()) for part in parts]
    flat = [ir.node("Reshape", [part, constant(step, "flat", np.array([1, -1]))]) for part in parts]
    joined = ir.node("Concat", [node.outputs[0] for node in flat], {"axis": 1})
    step.extend([*flat, joined])
    row = joined.outputs[0]
    row.name, row.shape, row.type = "row", ir.Shape([1, sum(sizes)]), ir.TensorType(ir.DataType.FLOAT)
    step.outputs[:] = [row]

    given = ir.Value(name=row.name, shape=row.shape, type=row.type)
    split = ir.node("Split", [given, constant(loop, "row_sizes", np.array(sizes))], {"axis": 1}, num_outputs=len(parts))
    shaped = []
    for part, piece in zip(parts, split.outputs, strict=True):
        shape = part.shape.numpy()
        shaped.append(ir.node("Reshape", [piece, constant(loop, "row_" + "_".join(map(str, shape)), np.array(shape))]))
        taken[part.name].replace_all_uses_with(shaped[-1].outputs[0])
        loop.inputs.remove(taken[part.name])
    loop.inputs.append(given)
    loop.insert_before(loop[0], [split, *shaped])


def write_step_table(step: Path, sampling: Sampling, folder: Path) -> Cut:
    """Evaluate the step graph, in fp32, at every timestep of the schedule; returns the manifest's record."""
    contract = Component.model_validate_json((step / "denoiser_step.json").read_text())
    timesteps = evaluated_timesteps(sampling, sampling.lay())
    with open_engine(step / "denoiser_step.onnx", None, "fp32") as engine:
        rows = [engine({"timestep": np.array([timestep], np.float32)}) for timestep in timesteps]
    (folder / STEP_TABLE).write_bytes(save({name: np.stack([row[name] for row in rows]) for name in rows[0]}))
    return Cut(step_table=STEP_TABLE, timesteps=timesteps, rows=contract.outputs)
