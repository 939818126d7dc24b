"""Quantise a small denoiser of square pictures with four channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import Component, TensorSpec
from slipcast_compiler.graph import qdq
from slipcast_compiler.precision.evaluations import Evaluations
from slipcast_compiler.precision.quantize import quantize_graph
from slipcast_compiler.recipe.passes import Quantize

GUIDANCE = 4.0


def contract(side: int) -> Component:
    sample, prediction = (
        TensorSpec(name=name, dtype="float32", shape=("batch", 4, side, side)) for name in ("sample", "prediction")
    )
    return Component(inputs=(sample,), outputs=(prediction,))


def write_samples(source: Path, side: int, count: int) -> Path:
    """Beside `source`: guided evaluations on noise, with what it predicts."""
    folder = source.parent / "samples"
    folder.mkdir()
    rng, run = np.random.default_rng(1), qdq.session(source)
    for i in range(count):
        sample = rng.standard_normal((2, 4, side, side)).astype(np.float32)
        np.savez(folder / f"{i:04}.npz", sample=sample, prediction=run({"sample": sample})["prediction"])
    return folder


def recorded(samples: Path) -> Evaluations:
    """The evaluations of write_samples."""
    return Evaluations(samples, guidance=GUIDANCE)


def quantise(source: Path, samples: Path, out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The quantised graph, and its report."""
    out.mkdir()
    quantize_graph(source, recorded(samples), Quantize(**options), out, lambda done, total: None)
    with np.load(samples / "0000.npz") as arrays:
        side = arrays["sample"].shape[-1]
    (out / "denoiser.json").write_text(contract(side).model_dump_json())
    return out / "denoiser.onnx", json.loads((out / "quantize.json").read_text())
