"""INT4 for the weights of linear layers, in every component that has many: one ONNX graph, which engines on CPUs read.

Inputs of layers are not quantised here: engines that compute in 8 bits choose ranges for them as they run. Convolutions
and tables of embeddings stay as they are in the rest of the target. docs/passes.md has the measurements, and where the
defaults come from.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipcast.bundle.onnxfile import external_files
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast_compiler.export.graphs import Graphs, Quantized
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.files import link
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.precision.evaluations import Evaluations
from slipcast_compiler.precision.quantize import REPORT, EngineCheck, protected_layers, read_report
from slipcast_compiler.precision.sensitivity import search
from slipcast_compiler.recipe.passes import QuantizeInt4
from slipcast_compiler.recipe.targets import LEAST_LINEAR

logger = logging.getLogger("slipcast")


ENGINE_ROUNDING = 0.05  # what engines may add that compute products in 8 bits: 0.018 for twelve wide layers in a row


def quantize_weights(
    folders: Mapping[str, Path], recorded: Mapping[str, Evaluations], options: QuantizeInt4, cache: Cache,
    advance: Advance,
) -> dict[str, Quantized]:  # fmt: skip
    """By component, FOLDER/NAME.onnx with linear layers in INT4, from the cache or made in a process of its own; those
    that have few are not among them. `recorded`: what each reads and gives in fp32. Directories are the cache's.

    Raises RecipeError where a pattern of `protect` fits no layer of any, and where nothing is left."""
    chosen = run_isolated(choose, folders, options.protect).result
    if not chosen:
        raise RecipeError(
            f"a target in int4, and no component of which linear layers have {LEAST_LINEAR:.0%} of the weights",
            expected="a target in another precision, or less in passes.quantize_int4.protect",
            got=", ".join(folders),
        )
    found = {}
    for done, (name, protected) in enumerate(chosen.items()):
        advance(done, len(chosen))
        own = options.model_copy(update={"protect": tuple(protected)})
        found[name] = _quantize_component(folders[name], name, recorded[name], own, cache)
        if not (report := read_report(found[name]))["quantised"]:
            logger.warning(
                "%s: no layer is in INT4: all together are %.2g off, more than max_error", name, report["error_all"]
            )
    return found


def quantize_all_weights(
    graphs: Graphs, samples: Path, options: QuantizeInt4, cache: Cache, advance: Advance
) -> Graphs:
    """With the components in INT4 beside those in fp32, calibrated on `samples` (see calibration.py)."""
    recorded = {}
    for name, contract in graphs.contracts.items():
        guided = name == "denoiser" and graphs.family
        if (samples / name).is_dir():
            outputs = tuple(spec.name for spec in contract.outputs)
            recorded[name] = Evaluations(
                samples / name, outputs, graphs.sampling.guidance_scale if guided else 1.0, options.samples
            )
    folders = {name: graphs.components[name] for name in recorded}
    made = quantize_weights(folders, recorded, options, cache, advance)
    components = {name: read_report(each) for name, each in made.items()}
    report = {"options": options.model_dump(mode="json"), "components": components}
    return graphs.add(report={"quantize_int4": report}, quantized={**graphs.quantized, "int4": made})


def choose(folders: Mapping[str, Path], protect: tuple[str, ...], _: Advance) -> dict[str, list[str]]:
    """The components whose linear layers have enough of their weights, with the layers of each that are protected."""
    import onnx

    from slipcast_compiler.graph.int4 import packable_layers

    layers, few = {}, set()
    for name, folder in folders.items():
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        layers[name] = found = packable_layers(graph)
        every = {linear.weight: linear.inputs * linear.outputs for each in found.values() for linear in each}
        if sum(every.values()) < LEAST_LINEAR * sum(math.prod(tensor.dims) for tensor in graph.initializer):
            few.add(name)
    protected = protected_layers("quantize_int4", protect, [layer for found in layers.values() for layer in found])
    return {
        name: sorted(protected & found.keys())
        for name, found in layers.items()
        if name not in few and found.keys() - protected
    }


def _quantize_component(
    folder: Path, name: str, recorded: Evaluations, options: QuantizeInt4, cache: Cache
) -> Quantized:
    def make(out: Path) -> None:
        run_isolated(quantize_graph, folder / f"{name}.onnx", recorded, options, out)
        shutil.copyfile(folder / f"{name}.json", out / f"{name}.json")

    inputs = {
        "source": folder.name, "component": name, "samples": recorded.folder.parent.name,
        "options": options.model_dump(), "guidance": recorded.guidance,
    }  # fmt: skip
    made = cache.get("int4", inputs, make)
    return Quantized(made, recorded.folder, check_of(made / f"{name}.onnx", recorded))


def check_of(model: Path, recorded: Evaluations) -> EngineCheck:
    """Sees whether an engine gives what the graph `model` says, whose report lies beside it."""
    error = json.loads(model.with_name(REPORT).read_text())["error"]
    return EngineCheck(model, recorded, math.hypot(error, ENGINE_ROUNDING))


def quantize_graph(source: Path, recorded: Evaluations, options: QuantizeInt4, out: Path, advance: Advance) -> None:
    """Write NAME.onnx and NAME.onnx.data, called as the source is, and quantize.json into `out`. `options.protect`:
    whole names of layers."""
    import onnx

    from slipcast_compiler.graph import int4, qdq
    from slipcast_compiler.graph.weights import load, save_gathered

    with tempfile.TemporaryDirectory(prefix="slipcast-int4-", dir=out.parent) as scratch:
        work = Path(scratch)
        for name in external_files(source):
            link(source.with_name(name), work / name)
        original = onnx.load(source, load_external_data=False)
        layers = int4.packable_layers(original.graph)
        free = {layer: each for layer, each in layers.items() if layer not in options.protect}
        importance = int4.importances(source, free, recorded.inputs(), work)
        packing = int4.Packing(options.group_size, options.rank)
        tensors = int4.pack_all(original.graph, source.parent, free, importance, packing, work / "packed")

        def write(chosen: frozenset[str]) -> Path:
            model = int4.with_int4(original, {layer: free[layer] for layer in chosen}, tensors, packing)
            onnx.save(model, work / "chosen.onnx")
            return work / "chosen.onnx"

        def error(chosen: frozenset[str], count: int) -> float:
            return recorded.error(qdq.session(write(chosen), mapped=True), count)

        found = search(list(free), error, options.max_error, options.measurements, advance)
        save_gathered(load(write(found.quantised)), out / source.name)
    kept = dict.fromkeys(options.protect, "protected") | dict.fromkeys(found.kept, "damage")
    report: dict[str, Any] = {
        "layers": len(layers), "quantised": len(found.quantised), "kept": kept, "error": found.error,
        "error_all": found.error_all, "tried": found.tried, "guidance_scale": recorded.guidance,
        "options": options.model_dump(mode="json"),
    }  # fmt: skip
    (out / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
