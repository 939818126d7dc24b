"""On an NVIDIA GPU: engines built from the reference bundle's portable graphs agree with those graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipcast.bundle.manifest import Component, Manifest, read_manifest
from slipcast.engines import Engine, cuda, open_engine
from slipcast.errors import HostError, RequestError
from slipcast_compiler.engines import tensorrt
from slipcast_compiler.graph import qdq
from slipcast_compiler.precision.evaluations import Evaluations
from slipcast_compiler.precision.quantize import quantize_graph
from slipcast_compiler.recipe.passes import Quantize
from slipcast_compiler.recipe.targets import TargetTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda.look().problem), reason=cuda.look().problem or "there is a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"),
]
COMPONENTS = ("text_encoder", "denoiser", "denoiser_prompt", "denoiser_step", "vae_decoder")
MOST = 8  # rows: guidance doubles four pictures
# Relative error to fp32: at most a few roundings of each type's 24, 11 and 8 bits.
LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2}


def feed(component: Component, batch: int) -> dict[str, Any]:
    """The first `batch` of the same MOST rows of random inputs; a free dimension that is not the batch is a tile's."""
    rng, arrays = np.random.default_rng(0), {}
    for spec in component.inputs:
        shape = [MOST if size == "batch" else 16 if isinstance(size, str) else size for size in spec.shape]
        made = rng.integers(0, 600, shape) if spec.dtype == "int64" else rng.standard_normal(shape).astype(spec.dtype)
        arrays[spec.name] = made[:batch] if spec.shape[0] == "batch" else made
    return arrays


@pytest.fixture(scope="module")
def manifest(shapes_bundle: Path) -> Manifest:
    return read_manifest((shapes_bundle / "manifest.json").read_bytes())


Engines = tuple[Component, str, Engine, Engine]


@pytest.fixture(scope="module", params=[(p, c) for p in LIMITS for c in COMPONENTS], ids="-".join)
def engines(
    request: pytest.FixtureRequest, manifest: Manifest, shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
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
        yield contract, precision, fast, exact


def batches(component: Component) -> tuple[int, ...]:
    """Pictures are decoded one by one, and a row of a table is computed by itself."""
    decodes = any(spec.name == "latent" for spec in component.inputs)
    return (1,) if decodes or component.inputs[0].shape[0] == 1 else (1, 2, MOST)


def test_parity(engines: Engines) -> None:
    component, precision, fast, exact = engines
    for batch in batches(component):
        expected = exact(feed(component, batch))
        for _ in range(3):  # kernels made for a shape, and the captured graph, come after the first calls
            found = fast(feed(component, batch))
            for key, array in expected.items():
                assert found[key].shape == array.shape
                error = np.linalg.norm(np.float64(found[key]) - array) / np.linalg.norm(np.float64(array))
                assert error < LIMITS[precision]


def test_results_outlive_the_next_call(engines: Engines) -> None:
    component, _, fast, _ = engines
    given = feed(component, batches(component)[-1])
    first = fast(given)
    kept = {key: array.copy() for key, array in first.items()}
    fast({key: np.roll(array, 1) for key, array in given.items()})
    for key, array in first.items():
        np.testing.assert_array_equal(array, kept[key])


def test_larger_than_the_profile(engines: Engines) -> None:
    component, _, fast, _ = engines
    inputs = {key: np.repeat(array, 9, axis=0) for key, array in feed(component, 1).items()}
    with pytest.raises(RequestError, match="not built for this shape"):
        fast(inputs)


def quantise(manifest: Manifest, model: Path, out: Path) -> Path:
    """The denoiser in INT8, calibrated on random inputs: for how engines read the graph, not for pictures."""
    contract, samples = manifest.components["denoiser"], out / "samples"
    samples.mkdir()
    inputs = feed(contract, 2)
    with open_engine("onnxruntime", model, None, "fp32", contract) as exact:
        np.savez(samples / "0000.npz", **inputs, **exact(inputs))
    options = Quantize(samples=1, max_error=10.0, symmetric=True)
    (out / "int8").mkdir()
    quantize_graph(model, Evaluations(samples), options, out / "int8", lambda *_: None)
    return out / "int8" / "denoiser.onnx"


def test_int8_is_read_as_it_is_written(manifest: Manifest, shapes_bundle: Path, tmp_path: Path) -> None:
    model = quantise(manifest, shapes_bundle / "onnxruntime-fp32" / "denoiser.onnx", tmp_path)
    contract = manifest.components["denoiser"]
    table = TargetTable(engine="tensorrt-rtx", precision="int8")
    files = tensorrt.build(model, "int8", tmp_path, tensorrt.options(table, "denoiser", manifest.image))
    expected = qdq.session(model)(feed(contract, 2))["prediction"]
    with open_engine("tensorrt-rtx", tmp_path / files.model, None, "int8", contract) as fast:
        found = fast(feed(contract, 2))["prediction"]
    # A value that half precision puts on the other side of a rounding is off by one of 127 steps.
    assert np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(np.float64(expected)) < 5e-2


def test_a_damaged_engine(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "denoiser.engine").write_bytes(b"no engine" * 1000)
    with pytest.raises(HostError, match=r"denoiser\.engine: tensorrt_rtx .* cannot run this engine here"):
        open_engine("tensorrt-rtx", tmp_path / "denoiser.engine", None, "fp16", manifest.components["denoiser"])
