"""On an NVIDIA GPU: engines built from the reference bundle's portable graphs agree with those graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipcast import cuda
from slipcast.engines import Engine, open_engine
from slipcast.errors import HostError, RequestError
from slipcast.manifest import Manifest, read_manifest
from slipcast_compiler.build import tensorrt
from slipcast_compiler.recipe import TargetTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda.look().problem), reason=cuda.look().problem or "there is a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"),
]
COMPONENTS = ("text_encoder", "denoiser", "vae_decoder")
# Relative error to fp32: at most a few roundings of each type's 24, 11 and 8 bits.
LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2}


def feed(component: str, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if component == "text_encoder":
        return {"input_ids": rng.integers(0, 600, (8, 32))[:batch]}
    if component == "vae_decoder":
        return {"latent": rng.standard_normal((1, 4, 16, 16)).astype(np.float32)}
    return {
        "sample": rng.standard_normal((8, 4, 16, 16)).astype(np.float32)[:batch],
        "timestep": np.array([481], np.float32),
        "encoder_hidden_states": rng.standard_normal((8, 32, 128)).astype(np.float32)[:batch],
    }


@pytest.fixture(scope="module")
def manifest(shapes_bundle: Path) -> Manifest:
    return read_manifest((shapes_bundle / "manifest.json").read_bytes())


@pytest.fixture(scope="module", params=[(p, c) for p in LIMITS for c in COMPONENTS], ids="-".join)
def engines(
    request: pytest.FixtureRequest, manifest: Manifest, shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Engine, Engine]]:
    """(component, precision, the engine, ONNX Runtime on the graph it was built from)"""
    precision, name = request.param
    model, out = shapes_bundle / "onnxruntime-fp32" / f"{name}.onnx", tmp_path_factory.mktemp("engine")
    table = TargetTable(engine="tensorrt-rtx", precision=precision)
    files = tensorrt.build(model, precision, out, tensorrt.options(table, name, manifest.image))
    contract = {str(key): value for key, value in manifest.components.items()}[name]
    with (
        open_engine("tensorrt-rtx", out / files.model, None, precision, contract) as fast,
        open_engine("onnxruntime", model, None, "fp32", contract) as exact,
    ):
        yield name, precision, fast, exact


def test_parity(engines: tuple[str, str, Engine, Engine]) -> None:
    name, precision, fast, exact = engines
    for batch in (1, 2, 8):
        expected = exact(feed(name, batch))
        for _ in range(3):  # kernels made for a shape, and the captured graph, come after the first calls
            found = fast(feed(name, batch))
            for key, array in expected.items():
                assert found[key].shape == array.shape
                error = np.linalg.norm(np.float64(found[key]) - array) / np.linalg.norm(np.float64(array))
                assert error < LIMITS[precision]


def test_results_outlive_the_next_call(engines: tuple[str, str, Engine, Engine]) -> None:
    name, _, fast, _ = engines
    first = fast(feed(name, 2))
    kept = {key: array.copy() for key, array in first.items()}
    fast({key: array[::-1].copy() for key, array in feed(name, 2).items()})
    for key, array in first.items():
        np.testing.assert_array_equal(array, kept[key])


def test_larger_than_the_profile(engines: tuple[str, str, Engine, Engine]) -> None:
    name, _, fast, _ = engines
    inputs = {key: np.repeat(array, 9, axis=0) for key, array in feed(name, 8).items() if key != "timestep"}
    if name == "denoiser":
        inputs["timestep"] = np.array([1], np.float32)
    with pytest.raises(RequestError, match="not built for this shape"):
        fast(inputs)


def test_a_damaged_engine(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "denoiser.engine").write_bytes(b"no engine" * 1000)
    with pytest.raises(HostError, match=r"denoiser\.engine: tensorrt_rtx .* cannot run this engine here"):
        open_engine("tensorrt-rtx", tmp_path / "denoiser.engine", None, "fp16", manifest.components["denoiser"])
