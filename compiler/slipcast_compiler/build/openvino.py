"""OpenVINO's intermediate representation: .xml and .bin."""

from __future__ import annotations

from pathlib import Path

from slipcast.manifest import EngineFiles


def build(model: Path, precision: str, out: Path) -> EngineFiles:
    """Convert a graph. But for fp32, its fp32 weights are kept in fp16, which halves the file; the host rounds them
    further. What is int8 stays so."""
    from slipcast.engines.openvino import openvino

    target = out / f"{model.stem}.xml"
    openvino.save_model(openvino.Core().read_model(model), target, compress_to_fp16=precision != "fp32")
    return EngineFiles(model=target.name, weights=target.with_suffix(".bin").name)
