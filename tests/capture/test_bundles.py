"""Bundles of tiny pipelines draw what the pipelines draw, of prompts, seeds and pictures that were not captured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundling import bundle_of, compare, compare_bundle, compare_together, make_bundle
from test_generalise import Doubled, Joined, Padded, PaddedByItself, Placed, made
from tiny import LENGTHS, PIPELINES, open_pipeline

import slipcast
from slipcast.bundle.program import rows_of_image
from slipcast.bundle.reader import open_any_bundle
from slipcast.engines import EngineWrapper
from slipcast.errors import RequestError, SlipcastError
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.graph.cut import count_parameters
from slipcast_compiler.graph.weights import load
from slipcast_compiler.recipe.targets import TargetTable

OTHER = "a large blue star on a black background"
OF_OTHER_LENGTHS = OTHER, "red", " ".join(["the blue star on the red circle"] * 6)
LEAST_DB = 60.0  # measured: 117 to 141
# pipeline -> why it has no bundle
REFUSED = {
    "stable_audio": "another generator",
}
FAST = ("flux",)
MADE = [name for name in PIPELINES if name not in REFUSED]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MADE]
)
def test_a_bundle_is_the_pipeline(name: str) -> None:
    if name == "kolors":
        pytest.importorskip("sentencepiece")
    prompts = OF_OTHER_LENGTHS if name in LENGTHS else (OTHER,)
    found = compare_bundle(open_pipeline(name), name, prompts, 7)
    assert found["psnr"] >= LEAST_DB
    assert found["psnr_together"] >= 100


@pytest.mark.parametrize(
    "kind",
    [Joined, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Doubled, Placed, Padded, PaddedByItself))],
)
def test_a_bundle_takes_prompts_of_all_lengths_in_its_range(kind: Any, tmp_path: Path) -> None:
    pipe = made(kind)
    bundle = bundle_of(pipe, "worded", [lambda prompt: make_call(pipe, {}, prompt)], tmp_path)
    with slipcast.load(bundle) as loaded:
        for prompt in OF_OTHER_LENGTHS:
            wanted = pipe(**make_call(pipe, {}, prompt, 3))["x"].numpy()
            found = loaded(prompt, seed=3, output_type="np").images[0]
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        legal = loaded.program.lengths["length"]
        with pytest.raises(RequestError, match="prompt has another length") as refused:
            loaded(" ".join(["red"] * (legal.maximum + 4)), seed=3)
        assert refused.value.expected == f"{legal.minimum} to {legal.maximum} tokens"


@pytest.mark.slow
def test_engines_agree_and_images_are_their_seeds(tmp_path: Path) -> None:
    tables = TargetTable(engine="onnxruntime"), TargetTable(engine="openvino")
    bundle = make_bundle(open_pipeline("flux"), "flux", tmp_path, *tables)
    drawn = {}
    assert {"denoiser", "denoiser_prompt", "denoiser_prompt_step"} <= set(open_any_bundle(bundle).manifest.components)
    for engine in ("onnxruntime", "openvino"):
        with slipcast.load(bundle, target=engine) as pipe:
            both = pipe(OTHER, seed=3, num_images_per_prompt=2, output_type="np").images
            alone = pipe(OTHER, seed=4, output_type="np").images
        np.testing.assert_array_equal(both[1], alone[0])
        drawn[engine] = both
    np.testing.assert_allclose(drawn["onnxruntime"], drawn["openvino"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen_image", "stable_diffusion_3"])
def test_images_of_one_call_on_openvino(name: str, tmp_path: Path) -> None:
    """By groups, of which each has its own rows, and all the same of what has none."""
    pipe = open_pipeline(name)
    bundle = make_bundle(pipe, name, tmp_path, TargetTable(engine="openvino"))
    manifest = open_any_bundle(bundle).manifest
    assert {"denoiser_prompt", "denoiser_step"} <= set(manifest.components)
    shapes = [spec.shape for spec in manifest.components["denoiser_prompt"].outputs]
    assert any(rows_of_image(shape) for shape in shapes)
    with slipcast.load(bundle) as loaded:
        assert compare_together(loaded, name, (OTHER, "red"), 7) >= 100
        assert compare(loaded, pipe, name, "red", 7)["psnr"] >= LEAST_DB


@pytest.mark.slow
def test_openvino_takes_tokens_that_come_first(tmp_path: Path) -> None:
    """Embeddings of [tokens, width]: the first dimension follows the prompt, and is no batch."""
    pipe, name = open_pipeline("qwen_image"), "qwen_image"
    bundle = make_bundle(pipe, name, tmp_path, TargetTable(engine="openvino", precision="fp32"))
    shapes = [spec.shape for part in open_any_bundle(bundle).manifest.components.values() for spec in part.inputs]
    assert any(shape and isinstance(shape[0], str) for shape in shapes)
    with slipcast.load(bundle) as loaded:
        for prompt in OF_OTHER_LENGTHS:
            assert compare(loaded, pipe, name, prompt, 7)["psnr"] >= LEAST_DB


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("flux", 0.3), ("stable_diffusion_3", 0.08)])
def test_what_leaves_the_loop(name: str, least: float, tmp_path: Path) -> None:
    """Modulation by pooled text and timestep is called once for each prompt and step, whatever the images."""
    bundle = make_bundle(open_pipeline(name), name, tmp_path)
    called = Counter[str]()

    def counted(component: str, open: Any) -> Any:
        engine = open()
        engine_call = engine.__call__

        class Counted(EngineWrapper):
            def __call__(self, arrays: Any) -> Any:
                called[component] += 1
                return engine_call(arrays)

        return Counted(engine)

    with slipcast.load(bundle, instrument=counted) as pipe:
        pipe(OTHER, seed=3, num_images_per_prompt=2, output_type="np")
    assert called["denoiser"] == 3  # with both images
    assert (called["denoiser_prompt"], called["denoiser_prompt_step"], called["conditioning"]) == (1, 3, 1)
    sizes = {part: count_parameters(load(bundle / f"onnxruntime-fp32/{part}.onnx").graph) for part in called}
    early = sizes["denoiser_prompt"] + sizes["denoiser_prompt_step"]
    assert early / (early + sizes["denoiser"]) >= least


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_bundle_is_refused(name: str) -> None:
    with pytest.raises(SlipcastError):
        compare_bundle(open_pipeline(name), name, (OTHER,), 7)
