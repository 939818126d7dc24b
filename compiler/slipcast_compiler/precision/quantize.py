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
from collections.abc import Callable, Iterator, Mapping
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
from slipcast_compiler.precision.sensitivity import prediction_error, search
from slipcast_compiler.recipe.passes import Quantize

Arrays = dict[str, npt.NDArray[Any]]

ENGINE_MARGIN = 1.25  # engines round where the graph does not say how


@dataclass(frozen=True)
class EngineCheck:
    """Sees whether an engine gives what the quantised graph in `folder` says; see export.graphs.Check."""

    folder: Path
    samples: Path
    guidance: float
    max_error: float

    def __call__(self, engine: str, folder: Path, files: EngineFiles) -> None:
        """CheckFailed where an engine is further off than quantisation may be: it reads the graph in its own way.

        The rest of the engine runs in fp32 here, so that nothing else is measured.
        """
        if ENGINES[engine].available():
            error = run_isolated(engine_error, self, engine, folder, files).result
        else:  # for a GPU that is not here
            error = run_isolated(signed_error, self.folder, self.samples, self.guidance).result
        if error > self.max_error * ENGINE_MARGIN:
            raise CheckFailed(
                f"{engine} gives other numbers for the INT8 denoiser than its graph says",
                expected=f"at most {self.max_error * ENGINE_MARGIN:.4f} off, as a relative L2 norm",
                got=f"{error:.4f}",
                hint="name the layers it gets wrong in passes.quantize.protect, or take another engine or precision",
            )


def quantize(graphs: Graphs, samples: Path, options: Quantize, cache: Cache, advance: Advance) -> Graphs:
    """With the denoiser in INT8 beside the one in fp32, calibrated on `samples` (see calibration.py).

    From the cache, or made in a process of its own. Raises RecipeError where a pattern of `protect` fits no layer.
    """
    exported, own = graphs.components["denoiser"], samples / "denoiser"
    guidance = graphs.sampling.guidance_scale if graphs.family else 1.0

    def make(out: Path) -> None:
        source = exported / "denoiser.onnx"
        run_isolated(quantize_graph, source, own, options, guidance, out, advance=advance)
        shutil.copyfile(exported / "denoiser.json", out / "denoiser.json")

    # Both directories are named by the hash of all that they were made from.
    inputs = {"source": exported.name, "samples": samples.name, "options": options.model_dump(), "guidance": guidance}
    folder = cache.get("quantized", inputs, make)
    check = EngineCheck(folder, own, guidance, options.max_error)
    report = json.loads((folder / "quantize.json").read_text())
    return graphs.add(report={"quantize": report}, quantized=Quantized(folder, own, check))


def quantize_graph(
    source: Path, samples: Path, options: Quantize, guidance: float, out: Path, advance: Advance
) -> None:
    """Write out/denoiser.onnx, out/denoiser.onnx.data and out/quantize.json."""
    import onnx

    from slipcast_compiler.graph import qdq, sdpa

    with tempfile.TemporaryDirectory(prefix="slipcast-quantize-", dir=out.parent) as name:
        work = Path(name)
        model = onnx.load(source, load_external_data=False)  # weights are read one at a time: there may be gigabytes
        weighted = qdq.layers_of(model.graph)
        attentions = {} if options.weights_only else sdpa.attentions_of(model.graph)
        layers = weighted | {layer: (node,) for layer, node in attentions.items()}
        protected = _protected(options.protect, layers)
        free = [layer for layer in layers if layer not in protected]
        nodes = {node for layer in free if layer in weighted for node in weighted[layer]}
        smoothed = 0
        if options.smooth_quant_alpha and not options.weights_only:
            peaks = partial(_peaks, source, samples, work)
            smoothed = qdq.smooth(model, nodes, options.smooth_quant_alpha, peaks, source.parent)
        qdq.save(model, work / "fp32.onnx", source.parent)
        del model
        qdq.insert(work / "fp32.onnx", sorted(nodes), _read(samples), work / "int8.onnx", options.symmetric)
        original, full = (onnx.load(work / file, load_external_data=False) for file in ("fp32.onnx", "int8.onnx"))
        scales = _attention_scales(
            original, {attentions[layer] for layer in free if layer in attentions}, samples, work
        )

        def write(chosen: frozenset[str], attention: Callable[[Any, Mapping[str, list[float]]], None]) -> Path:
            quantised = {node for layer in chosen for node in layers[layer]}
            model = qdq.select(full, original, quantised - scales.keys(), options.weights_only)
            attention(model.graph, {node: each for node, each in scales.items() if node in quantised})
            onnx.save(model, work / "chosen.onnx")
            return work / "chosen.onnx"

        def error(chosen: frozenset[str], count: int) -> float:
            run = qdq.session(write(chosen, sdpa.spell_out))
            return prediction_error(_by_row(run) if attentions else run, samples, guidance, count)

        found = search(free, error, options.max_error, options.measurements, advance)
        qdq.pack(write(found.quantised, sdpa.annotate), out / "denoiser.onnx")
    kept = dict.fromkeys(sorted(protected), "protected") | dict.fromkeys(found.kept, "damage")
    report = {
        "layers": len(layers), "quantised": len(found.quantised), "kept": kept, "error": found.error,
        "error_all": found.error_all, "tried": found.tried, "smoothed_norms": smoothed, "guidance_scale": guidance,
        "attentions": len(attentions), "attentions_quantised": len(found.quantised & attentions.keys()),
        "options": options.model_dump(mode="json"),
    }  # fmt: skip
    (out / "quantize.json").write_text(json.dumps(report, indent=1, allow_nan=False))


def engine_error(check: EngineCheck, engine: str, folder: Path, files: EngineFiles, advance: Advance) -> float:
    """prediction_error of an engine's files, with all that is not int8 in fp32."""
    contract = Component.model_validate_json((check.folder / "denoiser.json").read_text())
    weights = folder / files.weights if files.weights else None
    with open_engine(engine, folder / files.model, weights, "fp32", contract) as run:
        return prediction_error(run, check.samples, check.guidance)


def signed_error(folder: Path, samples: Path, guidance: float, _: Advance) -> float:
    """prediction_error of the graph as TensorRT is given it, computed by ONNX Runtime as it is written."""
    from slipcast_compiler.graph import qdq

    with tempfile.TemporaryDirectory(prefix="slipcast-signed-", dir=folder.parent) as name:
        signed = Path(name) / "denoiser.onnx"
        qdq.make_signed(folder / "denoiser.onnx", signed)
        return prediction_error(qdq.session(signed), samples, guidance)


def _protected(patterns: tuple[str, ...], layers: Mapping[str, Any]) -> set[str]:
    found = set()
    for pattern in patterns:
        if not (fitting := fnmatch.filter(layers, pattern)):
            raise RecipeError(
                f"passes.quantize.protect: {pattern!r} fits no layer", expected=f"a pattern such as {min(layers)!r}",
                got=f"{len(layers)} layers with other names",
            )  # fmt: skip
        found.update(fitting)
    return found


def _read(samples: Path) -> Iterator[Arrays]:
    """What the denoiser reads, one evaluation at a time."""
    for file in sorted(samples.glob("*.npz")):
        with np.load(file) as arrays:
            yield {name: arrays[name] for name in arrays if name != "prediction"}


def _by_row(run: Callable[[Mapping[str, Any]], Arrays]) -> Callable[[Mapping[str, Any]], Arrays]:
    """`run`, a row at a time: attention that is spelled out holds its scores, a gigabyte for 4096 tokens and 2 rows."""

    def run_rows(inputs: Mapping[str, Any]) -> Arrays:
        count = len(inputs["sample"])
        rows = [{k: v[i : i + 1] if len(v) == count else v for k, v in inputs.items()} for i in range(count)]
        outputs = [run(row) for row in rows]
        return {name: np.concatenate([each[name] for each in outputs]) for name in outputs[0]}

    return run_rows


def _attention_scales(original: Any, nodes: set[str], samples: Path, work: Path) -> dict[str, list[float]]:
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
    return sdpa.scales_of(model.graph, nodes, qdq.session(work / "attention.onnx"), _read(samples))


def _peaks(source: Path, samples: Path, work: Path, tensors: list[str]) -> Arrays:
    """max|x| over all samples of each tensor, per channel, which is its last axis."""
    import onnx

    from slipcast_compiler.graph import qdq

    model = onnx.load(source, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors)
    qdq.save(model, work / "peaks.onnx", source.parent)
    run, found = qdq.session(work / "peaks.onnx"), Arrays()
    for inputs in _read(samples):
        outputs = run(inputs)
        for name in tensors:
            peak = np.abs(outputs[name]).max(axis=tuple(range(outputs[name].ndim - 1)))
            found[name] = np.maximum(found.get(name, 0), peak)
    (work / "peaks.onnx.data").unlink()  # as large as the model
    return found
