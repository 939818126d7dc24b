"""Tiny valid bundles for tests: one ONNX Add with external weights as denoiser, a table, a report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

SHAPE = [1, 4, 8, 8]
MODEL, WEIGHTS, TABLE, REPORT = (
    "onnxruntime/denoiser.onnx",
    "onnxruntime/denoiser.data",
    "table.safetensors",
    "report.html",
)


def add_model() -> onnx.ModelProto:
    """y = x + b, of the manifest's shape."""
    bias = numpy_helper.from_array(np.arange(256, dtype=np.float32).reshape(SHAPE), "b")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "b"], ["y"])], "g", value[:1], value[1:], [bias])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def save_external(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with all its weights beside it, in a file with the suffix .data."""
    location = path.with_suffix(".data").name
    onnx.save_model(
        model, path, save_as_external_data=True, location=location, size_threshold=0, convert_attribute=True
    )


def write_files(root: Path) -> None:
    """All files of the bundle but the manifest."""
    (root / MODEL).parent.mkdir(parents=True)
    save_external(add_model(), root / MODEL)
    save_file({"rows": np.ones((2, 3), np.float32)}, root / TABLE)
    (root / REPORT).write_text("<p>fine</p>")


def list_files(root: Path) -> list[dict[str, Any]]:
    """The manifest's `files`, reckoned here without the code under test."""
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    return [
        {
            "path": p.relative_to(root).as_posix(),
            "size": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in paths
    ]


def document(files: list[dict[str, Any]]) -> dict[str, Any]:
    """A valid manifest that lists `files`, as the object that manifest.json holds."""
    spec = {"dtype": "float32", "shape": SHAPE}
    return {
        "schema_version": "1.0",
        "slipcast_version": "0.1.0",
        "name": "tiny",
        "base_model": "tests/tiny",
        "source_sha256": "0" * 64,
        "family": None,
        "components": {"denoiser": {"inputs": [{"name": "x", **spec}], "outputs": [{"name": "y", **spec}]}},
        "text": [],
        "image": {"width": 8, "height": 8, "channels": 4, "factor": 1, "tile": 8, "overlap": 2},
        "sampling": {"sampler": "euler", "steps": 2, "guidance_scale": 1.0, "noise": {"prediction": "epsilon"}},
        "targets": [
            {
                "engine": "onnxruntime",
                "device": "cpu",
                "precision": "fp32",
                "components": {"denoiser": {"model": MODEL, "weights": WEIGHTS}},
            }
        ],
        "files": files,
    }


def write_manifest(root: Path, **changes: Any) -> None:
    """(Re)write manifest.json for what lies below `root` now; `changes` replace top-level keys."""
    (root / "manifest.json").write_text(json.dumps({**document(list_files(root)), **changes}))


def write_bundle(root: Path) -> Path:
    """A valid bundle at `root`."""
    write_files(root)
    write_manifest(root)
    return root
