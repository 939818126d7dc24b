"""ONNX Runtime runs ONNX graphs themselves; what it optimises depends on the host and is done on loading."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from slipcast.bundle.manifest import EngineFiles
from slipcast.bundle.onnxfile import external_files
from slipcast_compiler.engines.needs import need_graph_libraries


def build(model: Path, precision: str, out: Path, fp32: Collection[str] = ()) -> EngineFiles:
    """Copy the graph and its weights: what is int8 is so in the graph, the rest is fp32; or cast it to fp16, all but
    the nodes `fp32`."""
    if precision == "fp16":
        need_graph_libraries()
        from slipcast_compiler.graph.casting import cast_graph

        cast_graph(model, precision, out / model.name, fp32)
        data = out / f"{model.name}.data"
        return EngineFiles(model=model.name, weights=data.name if data.is_file() else None)
    assert precision in ("fp32", "int8"), precision
    shutil.copyfile(model, out / model.name)
    weights = next(iter(external_files(model)), None)  # a stage may have none; a shallow denoiser has the full one's
    if weights:
        shutil.copyfile(model.with_name(weights), out / weights)
    return EngineFiles(model=model.name, weights=weights)
