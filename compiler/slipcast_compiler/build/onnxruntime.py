"""ONNX Runtime runs ONNX graphs themselves; what it optimises depends on the host and is done on loading."""

from __future__ import annotations

import shutil
from pathlib import Path

from slipcast.manifest import EngineFiles
from slipcast_compiler.build.needs import need_graph_libraries


def build(model: Path, precision: str, out: Path) -> EngineFiles:
    """Copy the graph and its weights: what is int8 is so in the graph, the rest is fp32; or cast it to fp16."""
    weights = model.with_name(f"{model.name}.data")
    if precision == "fp16":
        need_graph_libraries()
        from slipcast_compiler.build.casting import cast_graph

        cast_graph(model, precision, out / model.name)
        return EngineFiles(model=model.name, weights=weights.name if (out / weights.name).is_file() else None)
    assert precision in ("fp32", "int8"), precision
    files = [file for file in (model, weights) if file.is_file()]  # a stage may have no weights to speak of
    for file in files:
        shutil.copyfile(file, out / file.name)
    return EngineFiles(model=model.name, weights=weights.name if weights in files else None)
