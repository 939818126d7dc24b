"""The reference model with feature caching, compiled: what the bundle holds, and that pictures are the seeds' own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import slipcast
from conftest import ROOT, call_cli, compile_here
from slipcast.bundle.reader import open_bundle

PROMPTS = [f"a {size} {color} circle on a white background" for size in ("small", "large") for color in ("red", "blue")]
RECIPE = f"""
name = "cached"
model.path = "{ROOT / "recipes/models/shapes"}"
family.prompts = {PROMPTS}
sampling = {{ sampler = "dpmpp_2m", steps = 6, guidance_scale = 4.0, guidance_interval = [0.3, 20.0] }}
cut.general = true
caching.full_steps = 3
evaluate.images = 1
[[targets]]
engine = "openvino"
precision = "bf16"
[[targets]]
engine = "onnxruntime"
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, build_cache: str) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    (folder / "cached.toml").write_text(RECIPE)
    done = compile_here("cached.toml", "-o", "bundle", "--cache", build_cache, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


def test_the_manifest_and_the_report_say_what_is_cached(bundle: Path) -> None:
    manifest = open_bundle(bundle, files="all").manifest
    assert manifest.caching and manifest.caching.full_steps == 3 and manifest.caching.mask[0]
    assert manifest.caching.share <= 0.2 and "caching" in manifest.requires
    record = json.loads((bundle / "report.json").read_text())
    assert record["caching"]["mask"] == list(manifest.caching.mask)
    assert record["recipe"]["caching"] == {"full_steps": 3, "share": 0.2}
    parts = record["cut"]["parts"]
    assert parts["denoise"]["parameters"] < record["cut"]["original"]["parameters"]
    page = (bundle / "report.html").read_text()
    assert "Feature caching" in page and "What left the sampling loop" in page
    shown = call_cli("inspect", str(bundle))
    assert "caching      3 of 6 steps in full: F" in shown.stdout, shown.stderr


def test_both_denoisers_read_one_file_of_weights(bundle: Path) -> None:
    for target in open_bundle(bundle).manifest.targets:
        full, shallow = target.components["denoiser"], target.components["denoiser_shallow"]
        assert full.weights and shallow.weights == full.weights and shallow.model != full.model
    assert not list(bundle.rglob("denoiser_shallow.bin")) + list(bundle.rglob("denoiser_shallow.onnx.data"))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_a_seed_is_its_picture_whatever_the_batch(bundle: Path, target: str) -> None:
    """With features, and an interval that leaves the unconditional branch out of some steps."""
    with slipcast.load(bundle, target=target) as pipe:
        together = pipe(PROMPTS, seed=5, output_type="np").images
        again = pipe(PROMPTS, seed=5, output_type="np").images
        np.testing.assert_array_equal(again, together)
        for i, prompt in enumerate(PROMPTS):
            np.testing.assert_array_equal(pipe(prompt, seed=5 + i, output_type="np").images[0], together[i])


def test_shallow_steps_are_less_work_and_nearly_the_same_picture(bundle: Path) -> None:
    with slipcast.load(bundle, target="onnxruntime") as pipe:
        cached = pipe(PROMPTS[0], seed=5, output_type="np")
        assert cached.seconds["denoiser_shallow"] > 0
        full = pipe(PROMPTS[0], seed=5, num_inference_steps=7, output_type="np")  # others than the mask's
        assert "denoiser_shallow" not in full.seconds
    quality = open_bundle(bundle).manifest.targets[1].quality
    assert quality and quality.psnr_mean and quality.psnr_mean > 20
