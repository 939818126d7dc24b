"""ONNX Runtime runs the portable ONNX graph itself; what it optimises depends on the host and is done on loading."""

from __future__ import annotations

import shutil
from pathlib import Path

from slipcast.manifest import EngineFiles


def build(model: Path, precision: str, out: Path) -> EngineFiles:
    """Copy the graph and its weights: what is int8 is so in the graph, the rest is fp32."""
    assert precision in ("fp32", "int8"), precision
    weights = model.with_name(f"{model.name}.data")
    files = [file for file in (model, weights) if file.is_file()]  # a stage may have no weights to speak of
    for file in files:
        shutil.copyfile(file, out / file.name)
    return EngineFiles(model=model.name, weights=weights.name if weights in files else None)
