"""recipes/bench/builds.py: figures of builds, each of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from slipcast.bundle.manifest import ImageGeometry
from slipcast_compiler.engines import Source, tensorrt
from slipcast_compiler.engines.tensorrt import Made
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.recipe.targets import TargetTable

IMAGE = ImageGeometry(width=64, height=64, channels=4, factor=4, tile=16, overlap=4)


def _builds() -> Any:
    spec = importlib.util.spec_from_file_location("builds", ROOT / "recipes" / "bench" / "builds.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILDS = _builds()


def test_each_build_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str, int]] = []

    def make(model: Path, precision: str, out: Path, options: tensorrt.Options) -> Made:
        made.append((model.stem, precision, len(options.compute_capabilities)))
        engine = out / f"{model.stem}.engine"
        engine.write_bytes(bytes(10_000 * len(made)))
        return Made(engine, seconds=1.25, peak_memory_mb=2.0, widened=0)

    monkeypatch.setattr(tensorrt, "make_engine", make)
    cache, found = Cache(tmp_path / "cache"), []
    for _ in range(2):
        for name in ("denoiser", "denoiser_prompt"):  # stages lie in one directory
            source = Source(tmp_path / f"{name}.onnx", "the same directory")
            for gpus in BUILDS.GPUS:
                table = TargetTable(engine="tensorrt-rtx", precision="fp16", compute_capabilities=gpus or None)
                found.append(BUILDS.build(IMAGE, name, source, table, cache))
    assert made == [(name, "fp16", count) for name in ("denoiser", "denoiser_prompt") for count in (0, 2)]
    assert found[:4] == found[4:]
    assert [each["engine_mb"] for each in found[:4]] == [0.01, 0.02, 0.03, 0.04]
    assert [each["component"] for each in found[:4]] == ["denoiser", "denoiser", "denoiser_prompt", "denoiser_prompt"]
    assert not list(tmp_path.rglob("*.engine"))
