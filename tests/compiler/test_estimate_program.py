"""What a dry run says that the compile of a captured pipeline takes: against what it took, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import ROOT, bytes_under, call_cli, compile_here
from slipcast.errors import ResourceError
from slipcast_compiler.capture.shapes import ShapeRunner
from slipcast_compiler.estimate_program import Needs, choose_policies, choose_precision

sys.path.insert(0, str(ROOT / "tests" / "capture"))
from tiny import open_pipeline

RECIPE = """\
name = "tiny"
model.path = "model"
call = { num_inference_steps = 2, height = 32, width = 32 }
family = { prompts = ["a red circle", "a blue star", "a small white circle", "the background"], held_out = 0.5 }
targets = [{ engine = "onnxruntime" }]
"""
# Prints the most that any process of a command had resident; a process of its own, for others' children do not count.
MEASURE = """\
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "slipcast.cli.main", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimated")
    open_pipeline("stable_diffusion_xl").save_pretrained(folder / "model")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.mark.slow
def test_an_estimate_is_near_what_is_measured(tmp_path: Path) -> None:
    """Half of it would not be, nor twice. The reference model, as if nothing described it."""
    text = RECIPE.replace('"model"', f'"{ROOT / "recipes/models/shapes"}"').replace("32", "64")
    (tmp_path / "shapes.toml").write_text(
        text.replace('{ engine = "onnxruntime" }', '{ engine = "onnxruntime" }, { engine = "openvino" }')
    )
    told = json.loads(call_cli("compile", "shapes.toml", "--dry-run", "--json", cwd=tmp_path).stdout)
    command = [sys.executable, "-c", MEASURE, "compile", "shapes.toml", "--cache", "cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    took = {
        "memory": int(done.stdout.splitlines()[-1]),
        "bundle": bytes_under(tmp_path / "artifacts" / "tiny"),
        "cache": bytes_under(tmp_path / "cache"),
    }
    said = {**told["disk_bytes"], "memory": told["memory_bytes"]}
    assert said == pytest.approx(took, rel=0.3)


def test_what_does_not_fit_is_refused_in_the_plan(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipcast_compiler.plan_program.available_mb", lambda: 500.0)
    done = call_cli("compile", "tiny.toml", "--dry-run", cwd=place)
    assert (done.returncode, done.stdout) == (ResourceError.exit_code, ""), done.stderr
    for said in ("does not fit into memory", "about 0.6 GB in fp32 or 0.6 GB in bf16", "0.5 GB available", "next: "):
        assert said in done.stderr


def test_a_closed_family_takes_less(place: Path) -> None:
    said = [
        json.loads(call_cli("compile", "tiny.toml", "--dry-run", "--json", *options, cwd=place).stdout)
        for options in ((), ("--set", "family.closed=true"))
    ]
    bundles = [each["disk_bytes"]["bundle"] for each in said]
    assert bundles[1] == bundles[0] - 4 * said[0]["parts"]["conditioning"]["parameters"]
    assert said[0]["disk_bytes"]["cache"] == said[1]["disk_bytes"]["cache"]


def needs(fp32: int, bf16: int, target: int) -> Needs:
    return Needs(
        {"fp32": fp32, "bf16": bf16},
        1,
        {"openvino-fp32": {"all": target, "sequential": target - 2}},
        {"bundle": 1, "cache": 1},
    )


def test_the_pipeline_is_run_in_the_precision_that_fits() -> None:
    original = needs(8, 4, 1).original
    assert [choose_precision(original, available) for available in (9.0, 8.0, 7.0)] == ["fp32", "fp32", "bf16"]
    with pytest.raises(ResourceError, match="the pipeline itself"):
        choose_precision(original, 3.0)
    assert [needs(8, 4, each).memory("bf16", {"openvino-fp32": "all"}) for each in (3, 5)] == [4, 5]


def test_engines_stay_loaded_as_memory_has_room() -> None:
    assert choose_policies(needs(8, 4, 6), 6.0) == {"openvino-fp32": "all"}
    assert choose_policies(needs(8, 4, 6), 5.0) == {"openvino-fp32": "sequential"}
    with pytest.raises(ResourceError, match="target openvino-fp32 does not fit"):
        choose_policies(needs(8, 4, 6), 3.0)


@pytest.mark.slow
def test_a_pipeline_that_fits_in_bf16_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures are drawn in bf16, and the program is verified with random weights; the report says so."""
    plain = json.loads(call_cli("compile", "tiny.toml", "--dry-run", "--json", cwd=place).stdout)
    assert plain["original_precision"] == "fp32"
    monkeypatch.setattr("slipcast_compiler.plan_program.available_mb", lambda: 601.0)
    assert "in bf16, in which alone they fit here" in call_cli("compile", "tiny.toml", "--dry-run", cwd=place).stdout
    done = compile_here("tiny.toml", "--set", "gate.psnr=20", cwd=place)
    assert done.returncode == 0, done.stderr
    record = json.loads((place / "artifacts" / "tiny" / "report.json").read_text())
    assert (record["original_precision"], record["verified_with"]) == ("bf16", "functions")
    page = (place / "artifacts" / "tiny" / "report.html").read_text("utf-8")
    for said in ("functions of the same shapes take the places of modules", "in bf16, same seed", "original (bf16)"):
        assert said in page


# --- what values take ------------------------------------------------------------------------------------------------


class Attending(nn.Module):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x) + 1


@pytest.mark.parametrize(
    ("module", "shape", "floats"),
    [
        (nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 10)), (100, 10), 200_000),
        (nn.Sequential(nn.Linear(10, 1000), nn.ReLU(inplace=True), nn.Linear(1000, 10)), (100, 10), 101_000),
        # two slices of scores, what it gives and copies of it: not all scores, of which there are 2 * 8192 * 8192
        (Attending(), (1, 2, 8192, 8), 2 * 2**24 + 4 * 2 * 8192 * 8),
    ],
)
def test_what_is_alive_at_once(module: nn.Module, shape: tuple[int, ...], floats: int) -> None:
    runner = ShapeRunner()
    with torch.no_grad():
        runner.run(module, "module", (torch.zeros(shape),), {})
    assert runner.live.peak == 4 * floats
