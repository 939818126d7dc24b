"""A closed family of the reference model, compiled: the open bundle's pictures, without its text encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slipcast
from conftest import ROOT, call_cli, compile_here
from slipcast.bundle.reader import open_bundle
from slipcast.errors import RequestError

PROMPTS = [f"a {size} {color} circle on a white background" for size in ("small", "large") for color in ("red", "blue")]
PROMPTS += ["a large green star", "a small pink cross"]
RECIPE = f"""
name = "six"
model.path = "{ROOT / "recipes/models/shapes"}"
family.prompts = {PROMPTS}
sampling = {{ sampler = "dpmpp_2m", steps = 2, guidance_scale = 4.0 }}
cut = {{}}
evaluate.images = 1
[[targets]]
engine = "onnxruntime"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, build_cache: str) -> Path:
    """Where the family is compiled twice, as bundles named open and closed."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "six.toml").write_text(RECIPE)
    for name, closed in (("open", "false"), ("closed", "true")):
        options = ("-o", name, "--cache", build_cache, "--set", f"family.closed={closed}")
        done = compile_here("six.toml", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_nothing_of_the_text_encoder_is_shipped(folder: Path) -> None:
    names = {path.name for path in (folder / "closed").rglob("*") if path.is_file()}
    assert "prompts.safetensors" in names and "denoiser_prompt.onnx" in names
    assert [name for name in names if "encoder" in name or "token" in name] == []
    manifest = open_bundle(folder / "closed", files="all").manifest
    assert manifest.prompts and set(manifest.prompts.prompts) == {"", *PROMPTS}
    assert manifest.requires == ("cut", "closed_family") and not manifest.text
    report = (folder / "closed" / "report.html").read_text()
    assert "Not shipped: text_encoder" in report and "Not shipped" not in (folder / "open" / "report.html").read_text()


def test_the_pictures_are_the_open_bundles(folder: Path) -> None:
    with slipcast.load(folder / "open") as opened, slipcast.load(folder / "closed") as closed:
        for prompt in PROMPTS:
            ours, theirs = (pipe(prompt, seed=5, output_type="np").images for pipe in (closed, opened))
            np.testing.assert_array_equal(ours, theirs)
        ours, theirs = (
            pipe(PROMPTS[0], negative_prompt=PROMPTS[1], seed=5, output_type="np").images for pipe in (closed, opened)
        )
        np.testing.assert_array_equal(ours, theirs)
        with pytest.raises(RequestError, match="closed family") as caught:
            closed("a small red circle on a black background")
        assert repr("a small red circle on a white background") in str(caught.value)


def test_a_dry_run_says_what_is_not_shipped(folder: Path) -> None:
    done = call_cli("compile", "six.toml", "-o", "dry", "--dry-run", "--set", "family.closed=true", cwd=folder)
    assert "in place of text_encoder: 7 prompts" in done.stdout, done.stderr


def test_prompts_out_of_a_closed_family_cannot_be_judged(folder: Path) -> None:
    done = call_cli(
        "compile", "six.toml", "-o", "strangers", "--set", "family.closed=true",
        "--set", 'evaluate.out_of_family=["a cat"]', cwd=folder,
    )  # fmt: skip
    assert (done.returncode, "takes no other prompts" in done.stderr) == (2, True)
