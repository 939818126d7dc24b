"""A guarded bundle of the reference model, compiled: strangers are drawn by the denoiser that was not specialised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import slipcast
from conftest import ROOT, call_cli, compile_here
from slipcast_compiler.engines.recording import record

pytestmark = pytest.mark.slow  # a minute: two denoisers, and passes
MEMBER, STRANGER = "a small red circle on a white background", "a pink cross to the left of a navy ring"
RECIPE = f"""
name = "guarded"
model.path = "{ROOT / "recipes/models/shapes"}"
sampling = {{ sampler = "dpmpp_2m", steps = 4, guidance_scale = 4.0 }}
reference.steps = 3
early_exit = {{ max_error = 0.3, prompts = 2 }}
cut = {{}}
passes.prune_heads = {{ ratio = 0.5, criterion = "magnitude", correct = false }}
guard = {{ policy = "fallback", false_alarms = 0.1 }}
evaluate = {{ images = 1, out_of_family = ["{STRANGER}"] }}
[family]
templates = ["a {{size}} {{color}} circle on a {{background}} background"]
[family.slots]
size = ["small", "large"]
color = ["red", "green", "blue"]
background = ["white", "black", "gray"]
[[targets]]
engine = "onnxruntime"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, build_cache: str) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "guarded.toml").write_text(RECIPE)
    done = compile_here("guarded.toml", "-o", "bundle", "--cache", build_cache, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_strangers_get_the_originals_picture(folder: Path) -> None:
    """In fp32 it is the original's but for rounding; what was pruned to half its heads is far from it."""
    report = json.loads((folder / "bundle" / "report.json").read_text())
    quality = report["targets"][0]["quality"]
    assert quality["out_of_family"]["psnr_worst"] > 90 > 40 > quality["psnr_worst"]
    assert report["guard"]["alarms"] == {"onnxruntime-cpu-fp32": {"held_out": 0, "out_of_family": 1}}
    assert "out of the family" in (folder / "bundle" / "report.html").read_text()


def test_a_batch_of_both(folder: Path) -> None:
    with slipcast.load(folder / "bundle") as pipe:
        assert pipe.manifest.requires == ("cut", "guard", "early_exit")
        prompts = [MEMBER, STRANGER, MEMBER, STRANGER]
        out = pipe(prompts, seed=5, output_type="np")
        assert [verdict.fallback for verdict in out.guard] == [False, True, False, True]
        for i, prompt in enumerate(prompts):
            alone = pipe(prompt, seed=5 + i, output_type="np")
            np.testing.assert_array_equal(alone.images[0], out.images[i])
            assert (alone.guard[0], alone.steps[0]) == (out.guard[i], out.steps[i])
        assert out.steps[1] == out.steps[3] == 3 and max(out.steps[0], out.steps[2]) <= 4


def test_wrong_input_for_a_guard(folder: Path) -> None:
    closed = call_cli("compile", "guarded.toml", "--dry-run", "--set", "family.closed=true", cwd=folder)
    assert (closed.returncode, "[guard] is for an open family" in closed.stderr) == (2, True)
    rare = call_cli("compile", "guarded.toml", "--dry-run", "--set", "guard.false_alarms=0.01", cwd=folder)
    assert rare.returncode == 2 and "expected: 99 calibration prompts" in rare.stderr


def test_what_draws_strangers_is_recorded_too(folder: Path, tmp_path: Path) -> None:
    """For a cast to be measured on; the family's own denoiser draws the same prompt."""
    components = ("denoiser", "denoiser_fallback")
    for prompt in (MEMBER, STRANGER):
        out = tmp_path / prompt
        out.mkdir()
        record(folder / "bundle", "onnxruntime-cpu-fp32", components, [(prompt, 0)], 3, out, lambda done, total: None)
        assert {part.name: len(list(part.iterdir())) for part in out.iterdir()}.keys() == set(components)
