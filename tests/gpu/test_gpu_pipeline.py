"""On an NVIDIA GPU: whole pictures against the CPU bundle, and what they cost. Figures go to the test report (-rA)."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slipcast
from slipcast.bundle.manifest import Manifest, Target
from slipcast.engines import ENGINES, cuda
from slipcast.progress import Stages
from slipcast_compiler.add_target import add_target
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge.metrics import psnr
from slipcast_compiler.recipe.reading import parse_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda.look().problem), reason=cuda.look().problem or "there is a GPU"),
]
PROMPT = "a large red circle on a white background"
# (target, dB of the worst picture against ONNX Runtime on the CPU in fp32)
TARGETS = (
    ("tensorrt-rtx:fp32", 60), ("tensorrt-rtx:fp16", 40), ("tensorrt-rtx:bf16", 30), ("tensorrt:fp16", 40),
    ("onnxruntime-gpu:fp32", 60), ("onnxruntime-gpu:fp16", 40), ("onnxruntime-tensorrt:fp16", 40),
)  # fmt: skip


def median_ms(call: Callable[[], Any], count: int = 20) -> float:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def used_mb() -> float:
    from cuda.bindings import runtime

    _, free, total = runtime.cudaMemGetInfo()
    return float(total - free) / 1e6


@pytest.fixture(scope="module", params=TARGETS, ids=[name for name, _ in TARGETS])
def added(request: pytest.FixtureRequest, shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(bundle with the target, the target, its limit)"""
    wanted, limit = request.param
    table = parse_target(wanted)
    kind = ENGINES[table.engine]
    if not kind.available():
        pytest.skip(kind.why_not())
    folder = tmp_path_factory.mktemp("added")
    made = add_target(shapes_bundle, table, folder / "bundle", Cache(folder / "cache"), Stages())
    assert made.target.addition, made.not_run
    return made.output, made.target, limit


def test_pictures(added: tuple[Path, Target, float]) -> None:
    _, target, limit = added
    assert target.addition
    assert target.addition.psnr_worst > limit


def test_a_batch_is_its_pictures(added: tuple[Path, Target, float]) -> None:
    root, target, limit = added
    with slipcast.load(root, target=target.id) as pipe:
        together = pipe(PROMPT, seed=3, num_images_per_prompt=4, output_type="np").images
        for i, picture in enumerate(together):
            assert psnr(picture, pipe(PROMPT, seed=3 + i, output_type="np").images[0]) > limit


def test_sequential_residency_gives_the_same(added: tuple[Path, Target, float]) -> None:
    root, target, limit = added
    pictures = []
    for residency in ("all", "sequential"):
        with slipcast.load(root, target=target.id, residency=residency) as pipe:  # type: ignore[arg-type]
            pictures.append(pipe(PROMPT, seed=3, output_type="np").images[0])
    assert psnr(*pictures) > limit


def test_cost(added: tuple[Path, Target, float], record_property: Callable[[str, object], None]) -> None:
    """Time of a picture and of a step, and device memory; and that closing gives the memory back."""
    root, target, _ = added
    before = used_mb()
    with slipcast.load(root, target=target.id) as pipe:
        pipe(PROMPT, seed=1)
        figures = {"picture_ms": median_ms(lambda: pipe(PROMPT, seed=1))}
        steps = pipe.manifest.sampling.steps
        figures["step_ms"] = 1000 * pipe(PROMPT, seed=1).seconds["denoiser"] / steps
        figures["memory_mb"] = used_mb() - before
    for name, value in figures.items():
        record_property(name, round(value, 3))
    print(target.id, {name: round(value, 3) for name, value in figures.items()})
    assert used_mb() - before < 0.5 * figures["memory_mb"] + 100  # the libraries keep something


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_captured_graphs(shapes_bundle: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    from slipcast.engines.tensorrt import TensorRtEngine
    from slipcast_compiler.engines import tensorrt
    from slipcast_compiler.recipe.targets import TargetTable

    manifest: Manifest = slipcast.load(shapes_bundle, target="onnxruntime").manifest
    table = TargetTable(engine="tensorrt-rtx", precision="fp16")
    options = tensorrt.options(table, "denoiser", manifest.image)
    tensorrt.build(shapes_bundle / "onnxruntime-fp32" / "denoiser.onnx", "fp16", tmp_path, options)
    rng, results = np.random.default_rng(0), []
    inputs = {
        spec.name: rng.standard_normal([2 if isinstance(size, str) else size for size in spec.shape]).astype(spec.dtype)
        for spec in manifest.components["denoiser"].inputs
    }
    for capture in (True, False):
        with TensorRtEngine("tensorrt_rtx", tmp_path / "denoiser.engine", capture) as engine:
            for _ in range(5):
                results.append(engine(inputs)["prediction"])
            ms = median_ms(lambda: engine(inputs), 50)
            record_property(f"denoiser_ms_{'captured' if capture else 'launched'}", round(ms, 4))
            print("captured" if capture else "launched", f"{ms:.3f} ms")
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-3, atol=1e-3)
