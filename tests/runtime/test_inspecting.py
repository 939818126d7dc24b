"""What is said of targets: the shapes that compiled engines are for, and how an added one compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import document, list_files, write_files

from slipcast.bundle.evidence import render_evidence
from slipcast.bundle.manifest import Manifest, read_manifest
from slipcast.cli.inspect import bound_to, profile_lines


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A portable target, with one in INT8 for two kinds of GPU before it."""
    write_files(root := tmp_path / "bundle")
    (root / "denoiser.engine").write_bytes(b"engine")
    content = document(list_files(root))
    latent: list[Any] = ["batch", 4, "tile_height", 8]
    for specs in content["components"]["denoiser"].values():
        specs[0]["shape"] = latent
    ranges = {"batch": [1, 2, 8], "tile_height": [8, 16, 16], "tile_width": [8, 8, 8]}
    built = {"library_version": "1.7.1", "compute_capabilities": ["8.6", "8.9"], "max_images": 4}
    portable = content["targets"][0]
    engine: dict[str, Any] = {"engine": "tensorrt-rtx", "device": "cuda", "precision": "int8"}
    engine["components"] = {"denoiser": {"model": "denoiser.engine"}}
    content["targets"].insert(0, engine | {"built": built | {"profiles": {"denoiser": ranges}}})
    portable["addition"] = {
        "against": "another-cpu-fp32", "images": 3, "psnr_mean": 50.5, "psnr_worst": 48.25, "latency_s": 0.5,
        "latency_against_s": 1.0,
    }  # fmt: skip
    return read_manifest(json.dumps(content).encode())


def test_what_engines_are_bound_to(manifest: Manifest) -> None:
    engine, portable = manifest.targets
    assert engine.id == "tensorrt-rtx-cuda-int8-sm86-sm89"
    assert bound_to(engine) == ", tensorrt-rtx 1.7.1, compute capability 8.6 and 8.9, up to 4 images at once"
    assert profile_lines(manifest, engine) == [
        "denoiser: graph in int8 and fp16, batch 1 to 8, usually 2, tile_height 8 to 16, usually 16"
    ]
    assert bound_to(portable) == ""
    assert profile_lines(manifest, portable) == []


def test_a_report_names_what_an_added_target_was_compared_with(manifest: Manifest) -> None:
    text = render_evidence(manifest, {}, Path("report.html"))
    assert "tensorrt-rtx-cuda-int8-sm86-sm89: not judged: the machine that built it could not run it" in text
    assert (
        "onnxruntime-cpu-fp32: added later; against another-cpu-fp32 PSNR worst 48.2 dB, 3 images, "
        "0.500 s per image (1.000 s)"
    ) in text
