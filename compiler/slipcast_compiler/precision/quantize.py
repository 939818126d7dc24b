"""INT8 for the denoiser: one ONNX graph with QuantizeLinear and DequantizeLinear, which every engine reads.

ONNX Runtime's quantiser does the mechanics: it writes one graph that can be cut back layer by layer without calibrating
again. Activations are unsigned, and a Q/DQ pair is read by nothing but layers (qdq.select): OpenVINO 2026.4 gets a
tensor in signed 8 bits wrong that something else reads too, and is right with either. Engines are checked all the same
(EngineCheck). docs/passes.md has the measurements, and where the default of `max_error` comes from.

TensorRT reads nothing but signed ones about zero. Unsigned ones about 128 are the same numbers: so where a target asks
for them (`symmetric`), ranges are made symmetric and kept unsigned, CPU engines read that graph as any other, and
build/tensorrt.py has it rewritten (qdq.make_signed). One graph serves all.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Component, EngineFiles
from slipcast.engines import ENGINES, open_engine
from slipcast.errors import CheckFailed, RecipeError
from slipcast.progress import Advance
from slipcast_compiler.export.graphs import Graphs, Quantized
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.precision.evaluations import Evaluations
from slipcast_compiler.precision.sensitivity import search
from slipcast_compiler.recipe.passes import Quantize

Arrays = dict[str, npt.NDArray[Any]]

ENGINE_MARGIN = 1.25  # engines round where the graph does not say how
REPORT = "quantize.json"


@dataclass(frozen=True)
class EngineCheck:
    """Sees whether an engine gives what the quantised graph `model` says; see export.graphs.Check."""

    model: Path
    recorded: Evaluations
    max_error: float

    def __call__(self, engine: str, folder: Path, files: EngineFiles) -> None:
        """CheckFailed where an engine is further off than quantisation may be: it reads the graph in its own way.

        The rest of the engine runs in fp32 here, so that nothing else is measured.
        """
        if ENGINES[engine].available():
            error = run_isolated(engine_error, self, engine, folder, files).result
        else:  # for a GPU that is not here
            error = run_isolated(signed_error, self.model, self.recorded).result
        if error > self.max_error * ENGINE_MARGIN:
            raise CheckFailed(
                f"{engine} gives other numbers for the quantised {self.model.stem} than its graph says",
                expected=f"at most {self.max_error * ENGINE_MARGIN:.4f} off, as a relative L2 norm",
                got=f"{error:.4f}",
                hint="name the layers it gets wrong under protect in the recipe, or take another engine or precision",
            )


def quantize(graphs: Graphs, samples: Path, options: Quantize, cache: Cache, advance: Advance) -> Graphs:
    """With the denoiser in INT8 beside the one in fp32, calibrated on `samples` (see calibration.py).

    Raises RecipeError where a pattern of `protect` fits no layer.
    """
    guidance = graphs.sampling.guidance_scale if graphs.family else 1.0
    recorded = Evaluations(samples / "denoiser", guidance=guidance, samples=options.samples)
    made = quantize_component(graphs.components["denoiser"], "denoiser", recorded, options, cache, advance)
    quantized = {**graphs.quantized, "int8": {"denoiser": made}}
    return graphs.add(report={"quantize": read_report(made)}, quantized=quantized)


def quantize_component(
    exported: Path, name: str, recorded: Evaluations, options: Quantize, cache: Cache, advance: Advance
) -> Quantized:
    """exported/NAME.onnx in INT8, from the cache or made in a process of its own; both directories are the cache's."""

    def make(out: Path) -> None:
        run_isolated(quantize_graph, exported / f"{name}.onnx", recorded, options, out, advance=advance)
        shutil.copyfile(exported / f"{name}.json", out / f"{name}.json")

    # Directories of the cache are named by the hash of all that they were made from.
    inputs = {
        "source": exported.name, "component": name, "samples": recorded.folder.parent.name,
        "options": options.model_dump(), "guidance": recorded.guidance,
    }  # fmt: skip
    folder = cache.get("quantized", inputs, make)
    return Quantized(folder, recorded.folder, EngineCheck(folder / f"{name}.onnx", recorded, options.max_error))


def read_report(quantized: Quantized) -> dict[str, Any]:
    """What quantize_graph found."""
    found: dict[str, Any] = json.loads((quantized.folder / REPORT).read_text())
    return found


def quantize_graph(source: Path, recorded: Evaluations, options: Quantize, out: Path, advance: Advance) -> None:
    """Write NAME.onnx and NAME.onnx.data, called as the source is, and quantize.json into `out`."""
    import onnx

    from slipcast_compiler.graph import qdq, sdpa

    with tempfile.TemporaryDirectory(prefix="slipcast-quantize-", dir=out.parent) as name:
        work = Path(name)
        model = onnx.load(source, load_external_data=False)  # weights are read one at a time: there may be gigabytes
        weighted = qdq.layers_of(model.graph)
        attentions = {} if options.weights_only else sdpa.attentions_of(model.graph)
        layers = weighted | {layer: (node,) for layer, node in attentions.items()}
        protected = protected_layers("quantize", options.protect, layers)
        free = [layer for layer in layers if layer not in protected]
        nodes = {node for layer in free if layer in weighted for node in weighted[layer]}
        smoothed = 0
        if options.smooth_quant_alpha and not options.weights_only:
            peaks = partial(_peaks, source, recorded, work)
            smoothed = qdq.smooth(model, nodes, options.smooth_quant_alpha, peaks, source.parent)
        qdq.save(model, work / "fp32.onnx", source.parent)
        del model
        qdq.insert(work / "fp32.onnx", sorted(nodes), recorded.inputs(), work / "int8.onnx", options.symmetric)
        original, full = (onnx.load(work / file, load_external_data=False) for file in ("fp32.onnx", "int8.onnx"))
        scales = _attention_scales(
            original, {attentions[layer] for layer in free if layer in attentions}, recorded, work
        )

        def write(chosen: frozenset[str], attention: Callable[[Any, Mapping[str, list[float]]], None]) -> Path:
            quantised = {node for layer in chosen for node in layers[layer]}
            model = qdq.select(full, original, quantised - scales.keys(), options.weights_only)
            attention(model, {node: each for node, each in scales.items() if node in quantised})
            onnx.save(model, work / "chosen.onnx")
            return work / "chosen.onnx"

        def error(chosen: frozenset[str], count: int) -> float:
            return recorded.error(qdq.session(write(chosen, sdpa.simulate)), count)

        found = search(free, error, options.max_error, options.measurements, advance)
        qdq.pack(write(found.quantised, sdpa.annotate), out / source.name)
    kept = dict.fromkeys(sorted(protected), "protected") | dict.fromkeys(found.kept, "damage")
    report = {
        "layers": len(layers), "quantised": len(found.quantised), "kept": kept, "error": found.error,
        "error_all": found.error_all, "tried": found.tried, "smoothed_norms": smoothed,
        "guidance_scale": recorded.guidance, "attentions": len(attentions),
        "attentions_quantised": len(found.quantised & attentions.keys()), "options": options.model_dump(mode="json"),
    }  # fmt: skip
    (out / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))


def engine_error(check: EngineCheck, engine: str, folder: Path, files: EngineFiles, advance: Advance) -> float:
    """The error of an engine's files, with all that is not int8 in fp32."""
    contract = Component.model_validate_json(check.model.with_suffix(".json").read_text())
    weights = folder / files.weights if files.weights else None
    with open_engine(engine, folder / files.model, weights, "fp32", contract) as run:
        return check.recorded.error(run)


def signed_error(model: Path, recorded: Evaluations, _: Advance) -> float:
    """The error of the graph as TensorRT is given it, computed by ONNX Runtime as it is written."""
    from slipcast_compiler.graph import qdq

    with tempfile.TemporaryDirectory(prefix="slipcast-signed-", dir=model.parent.parent) as name:
        signed = Path(name) / model.name
        qdq.make_signed(model, signed)
        return recorded.error(qdq.session(signed))


def protected_layers(table: str, patterns: tuple[str, ...], layers: Collection[str]) -> set[str]:
    """Those that the table's patterns fit; RecipeError where one fits none."""
    found = set()
    for pattern in patterns:
        if not (fitting := fnmatch.filter(layers, pattern)):
            raise RecipeError(
                f"passes.{table}.protect: {pattern!r} fits no layer",
                expected=f"a pattern such as {min(layers)!r}" if layers else "a component with layers",
                got=f"{len(layers)} layers with other names",
            )  # fmt: skip
        found.update(fitting)
    return found


def _attention_scales(original: Any, nodes: set[str], recorded: Evaluations, work: Path) -> dict[str, list[float]]:
    """See sdpa.scales_of; `original` has its weights in `work`."""
    import onnx

    from slipcast_compiler.graph import qdq, sdpa

    if not nodes:
        return {}
    model = onnx.ModelProto()
    model.CopyFrom(original)
    read = {name for node in model.graph.node if node.name in nodes for name in node.input[:3]}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(read))
    onnx.save(model, work / "attention.onnx")
    return sdpa.scales_of(model.graph, nodes, qdq.session(work / "attention.onnx"), recorded.inputs())


def _peaks(source: Path, recorded: Evaluations, work: Path, tensors: list[str]) -> Arrays:
    """max|x| over all samples of each tensor, per channel, which is its last axis."""
    import onnx

    from slipcast_compiler.graph import qdq

    model = onnx.load(source, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors)
    qdq.save(model, work / "peaks.onnx", source.parent)
    run, found = qdq.session(work / "peaks.onnx"), Arrays()
    for inputs in recorded.inputs():
        outputs = run(inputs)
        for name in tensors:
            peak = np.abs(outputs[name]).max(axis=tuple(range(outputs[name].ndim - 1)))
            found[name] = np.maximum(found.get(name, 0), peak)
    (work / "peaks.onnx.data").unlink()  # as large as the model
    return found
