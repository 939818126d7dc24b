"""Bundles of tiny pipelines draw what the pipelines draw, of prompts, seeds and pictures that were not captured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bundling import compare_bundle, make_bundle
from tiny import LENGTHS, PIPELINES, open_pipeline

import slipcast
from slipcast_compiler.recipe.targets import TargetTable

OTHER = "a large blue star on a black background"
LEAST_DB = 60.0  # measured: 117 to 141
# pipeline -> why it has no bundle
REFUSED = {
    "stable_audio": "another generator",
}
FAST = ("flux", "ddpm")
MADE = [name for name in PIPELINES if name not in REFUSED and name not in LENGTHS]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MADE]
)
def test_a_bundle_is_the_pipeline(name: str) -> None:
    if name == "kolors":
        pytest.importorskip("sentencepiece")
    assert compare_bundle(open_pipeline(name), name, OTHER, 7)["psnr"] >= LEAST_DB


def test_engines_agree_and_images_are_their_seeds(tmp_path: Path) -> None:
    tables = TargetTable(engine="onnxruntime"), TargetTable(engine="openvino")
    bundle = make_bundle(open_pipeline("flux"), "flux", tmp_path, *tables)
    drawn = {}
    for engine in ("onnxruntime", "openvino"):
        with slipcast.load(bundle, target=engine) as pipe:
            both = pipe(OTHER, seed=3, num_images_per_prompt=2, output_type="np").images
            alone = pipe(OTHER, seed=4, output_type="np").images
        np.testing.assert_array_equal(both[1], alone[0])
        drawn[engine] = both
    np.testing.assert_allclose(drawn["onnxruntime"], drawn["openvino"], atol=1e-4)
