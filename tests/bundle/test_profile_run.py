"""`slipcast profile-run` on the reference model: real engines, real profilers, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import call_cli

CODE = """
import sys
from slipcast.cli.main import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "slipcast_compiler"} & set(sys.modules), sorted(sys.modules)
"""
KINDS = {
    "openvino": {"Convolution", "FullyConnected"}, "onnxruntime": {"Conv", "MatMul"},
}  # fmt: skip


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_profile(shapes_bundle: Path, tmp_path: Path, target: str) -> None:
    command = [sys.executable, "-c", CODE, "profile-run", str(shapes_bundle), "--target", target, "--steps", "3"]
    done = subprocess.run(
        [*command, "-o", "new/page.html", "--json"], cwd=tmp_path, env=os.environ, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["files"] == ["new/page.html"]
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "page.html"]  # no traces left behind
    assert "<svg" in (tmp_path / "new" / "page.html").read_text("utf-8")
    assert "circle" in found["prompt"]
    assert len(found["steps"]) == 3
    assert {each["name"]: each["calls"] for each in found["components"]} == {
        "text_encoder": 1, "denoiser_prompt": 1, "denoiser_step": 3, "denoiser": 3, "vae_decoder": 1,
    }  # fmt: skip
    assert sum(each["seconds"] for each in found["components"]) + found["host_s"] == pytest.approx(found["seconds"])
    for component in found["components"]:
        layers = [each for each in found["layers"] if each["component"] == component["name"]]
        inside = sum(each["seconds"] for each in layers)
        assert inside + component["outside_layers_s"] == pytest.approx(component["seconds"])
        assert inside > 0
        assert component["memory"]["peak_mb"] >= component["memory"]["added_mb"] - 1 > 0
    (denoiser,) = [each for each in found["components"] if each["name"] == "denoiser"]
    assert denoiser["outside_layers_s"] < 0.8 * denoiser["seconds"]
    assert denoiser["memory"]["added_mb"] > 30  # 11 million parameters, in bf16 at least
    assert {each["kind"] for each in found["operators"] if each["component"] == "denoiser"} >= KINDS[target]
    modules = {each["module"] for each in found["layers"]}
    assert ("down_blocks.0.resnets.0.conv1" in modules) == (target == "openvino")


def test_wrong_input(shapes_bundle: Path, tmp_path: Path) -> None:
    unknown = call_cli("profile-run", str(shapes_bundle), "--target", "tensorrt", "--json", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "openvino-cpu-bf16" in json.loads(unknown.stdout)["error"]["expected"]
    missing = call_cli("profile-run", str(tmp_path / "nothing"), cwd=tmp_path)
    assert missing.returncode == 4
    folder = call_cli("profile-run", str(shapes_bundle), "-o", str(tmp_path), cwd=tmp_path)
    assert folder.returncode == 2
    assert "name a page" in folder.stderr
    assert not list(tmp_path.iterdir())
