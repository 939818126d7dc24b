"""Timings of kernels, which TensorRT keeps from one build to the next: against a library that stands in for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipcast.engines import cuda
from slipcast.engines.cuda import Cuda, Gpu
from slipcast_compiler.engines import tensorrt
from slipcast_compiler.engines.tensorrt import Options
from slipcast_compiler.engines.timings import find_timings, keep_timings, read_timings

# Counts its builds in its timings, and takes none that are not of its own.
LIBRARY = """
class ILogger:
    def __init__(self): pass
class NetworkDefinitionCreationFlag: STRONGLY_TYPED = 0
class LayerType: ATTENTION_OUTPUT = 0
class Config:
    def create_timing_cache(self, content): return content if content[:2] in (b"", b"ok") else None
    def set_timing_cache(self, cache, ignore_mismatch): self.cache = cache or b"ok"; return not ignore_mismatch
    def get_timing_cache(self): return self
    def serialize(self): return self.cache + b"+"
    def add_optimization_profile(self, profile): pass
class Builder:
    num_layers = num_inputs = 0
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags): return self
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return None
    def build_serialized_network(self, network, config): return config.cache
class OnnxParser:
    def __init__(self, network, logger): pass
    def parse_from_file(self, path): return True
"""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU and TensorRT."""
    monkeypatch.setattr(cuda, "look", lambda: Cuda((Gpu("Some GPU (PCIe)", "8.9", 10**10),), "13.0"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "11.4.0")


@pytest.mark.usefixtures("host")
def test_there_is_one_for_each_version_and_gpu(tmp_path: Path) -> None:
    assert find_timings("tensorrt", tmp_path) == tmp_path / "timings-tensorrt-11.4.0-Some-GPU-PCIe-"
    assert find_timings("tensorrt-rtx", tmp_path) is None


def test_a_build_goes_on_from_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "standing_builder.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    out, kept = tmp_path / "out", tmp_path / "timings"
    out.mkdir()
    engines = []
    for content in (None, None, b"of another GPU"):
        if content:
            kept.write_bytes(content)
        files = tensorrt.build(tmp_path / "denoiser.onnx", "fp32", out, Options("standing_builder", ()), kept)
        engines.append((out / files.model).read_bytes())
    assert engines == [b"ok", b"ok+", b"ok"]
    assert kept.read_bytes() == b"ok+"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "t"))) == ["timings"]


def test_a_library_that_takes_none(tmp_path: Path) -> None:
    asked: list[bytes] = []
    config: Any = SimpleNamespace(create_timing_cache=asked.append, get_timing_cache=lambda: config, serialize=bytes)
    read_timings(config, tmp_path / "timings")
    assert asked == [b"", b""]
    keep_timings(config, tmp_path / "timings")
    assert (tmp_path / "timings").read_bytes() == b""
