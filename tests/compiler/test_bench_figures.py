"""The arithmetic of a benchmark, without running one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slipcast.bundle.manifest import Sampling
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.bench import figures
from slipcast_compiler.bench.document import parse_document
from slipcast_compiler.bench.energy import Meter
from slipcast_compiler.bench.gpu import Gpus
from slipcast_compiler.bench.measure import Results
from slipcast_compiler.bench.pages import render_page
from slipcast_compiler.bench.peaks import Peaks, measure_peaks
from slipcast_compiler.bench.plan import BUNDLE, Options, Side
from slipcast_compiler.bench.process import Drawn
from slipcast_compiler.bench.running import Measured
from slipcast_compiler.bench.summary import make_document
from slipcast_compiler.bench.table import render_table
from slipcast_compiler.host.machine import this_processor
from slipcast_compiler.judge.metrics import MAX_PSNR, Reference, summarise

RNG = np.random.default_rng(0)


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine became twice as slow for all after the first image: ratios do not see it, medians would.
    assert figures.ratios([3.0, 6.0, 8.0], [1.0, 2.0, 2.0]) == {"median": 3.0, "min": 3.0, "max": 4.0, "pairs": 3}


def test_a_slow_peer_is_divided_by_all_that_the_bundle_did() -> None:
    assert figures.ratios([10.0], [2.0, 1.0, 1.0]) == {"median": 10.0, "min": 10.0, "max": 10.0, "pairs": 1}


@pytest.mark.parametrize(
    ("compile_s", "peer_s", "bundle_s", "count"),
    [(100.0, 0.5, 0.25, 400), (100.0, 0.3, 0.0, 334), (100.0, 0.2, 0.2, None), (100.0, 0.1, 0.2, None)],
)
def test_break_even(compile_s: float, peer_s: float, bundle_s: float, count: int | None) -> None:
    assert figures.break_even(compile_s, peer_s, bundle_s) == count


def test_quality_agrees_with_the_reports_metrics() -> None:
    reference = RNG.random((4, 32, 32, 3), dtype=np.float32)
    found = np.clip(reference + RNG.normal(0, 0.02, reference.shape), 0, 1).astype(np.float32)
    scores = RNG.random(4).astype(np.float32) + 1, RNG.random(4).astype(np.float32) + 1
    quality = figures.quality(reference, found, scores, pixels=True)
    metrics = summarise({**Reference(reference, "abcd").sample(found), "clip_before": scores[0], "clip": scores[1]})
    for name in ("psnr_mean", "ssim_mean", "clip_delta_mean"):
        value = quality[name]
        assert value
        assert value["value"] == pytest.approx(getattr(metrics, name), rel=1e-5)
        assert value["low"] <= value["value"] <= value["high"]


def test_what_was_not_run_is_none() -> None:
    images = RNG.random((3, 16, 16, 3), dtype=np.float32)
    assert figures.quality(images, images[:2], None, pixels=False) == {
        "psnr_mean": None, "ssim_mean": None, "clip_delta_mean": None,
    }  # fmt: skip
    same = figures.quality(images, images, None, pixels=True)["psnr_mean"]
    assert same == {"value": MAX_PSNR, "low": MAX_PSNR, "high": MAX_PSNR}


def _zone(root: Path, name: str, energy: int) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder / "energy_uj"


def test_energy_of_all_packages_over_the_counters_end(tmp_path: Path) -> None:
    first, second = _zone(tmp_path, "intel-rapl:0", 100_000), _zone(tmp_path, "intel-rapl:1", 900_000)
    part = _zone(tmp_path, "intel-rapl:0:0", 0)
    meter = Meter(tmp_path)
    first.write_text("600000\n")
    second.write_text("150000\n")  # it began again after 1000000
    part.write_text("500000\n")  # of a package that is counted already
    assert meter.read() == pytest.approx(0.5 + 0.25)
    assert meter.read() == 0


def test_no_energy_where_nothing_can_be_read(tmp_path: Path) -> None:
    assert Meter(tmp_path / "absent").read() is None


class FakeNvml(ModuleType):
    """Two GPUs: of the first, process 7 holds 2 GB and another 1 GB; the second does not tell who holds what."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules = [1000, 5000]

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.millijoules[handle] < 0:
            raise self.NVMLError("not supported")
        return self.millijoules[handle]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        if handle == 1:
            return [SimpleNamespace(pid=7, usedGpuMemory=None)]
        return [SimpleNamespace(pid=7, usedGpuMemory=2 * 10**9), SimpleNamespace(pid=8, usedGpuMemory=10**9)]


def test_energy_and_memory_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpus = Gpus()
    assert len(gpus) == 2
    nvml.millijoules = [2500, 6000]
    assert gpus.read() == 2.5
    assert gpus.read() == 0
    assert gpus.memory_mb(7) == 2000
    assert gpus.memory_mb(9) is None
    nvml.millijoules = [3000, -1]
    assert gpus.read() is None


def test_no_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (len(Gpus()), Gpus().read(), Gpus().memory_mb(7)) == (0, None, None)
    broken = FakeNvml()
    monkeypatch.setattr(broken, "nvmlDeviceGetCount", lambda: 1 / 0)  # a library without its driver
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert (len(Gpus()), Gpus().read(), Gpus().memory_mb(7)) == (0, None, None)


def _measured(name: str, seconds: tuple[float, ...], **fields: Any) -> Measured:
    """A side that drew pictures of one grey."""
    drawn = [Drawn(np.full((1, 16, 16, 3), 0.5, np.float32), s, {"denoiser": s / 2}, 500.0) for s in seconds]
    side = Side(name, f"the side {name}", "python", {}, **fields)
    silent: list[float | None] = [None] * len(drawn)
    about = {"steps": 4}
    return Measured(side, None, 1.0, 2.0, about, [0.5, 0.4], drawn, silent, list(silent), list(silent), {4: drawn[:2]})


def test_a_document_of_what_was_measured() -> None:
    """Without a bundle: what it says of itself is made up."""
    image = SimpleNamespace(width=16, height=16)
    manifest = SimpleNamespace(name="made", source_sha256="0" * 64, image=image)
    sampling = Sampling(sampler="heun", schedule="karras", steps=4, guidance_scale=3.0, noise=NoiseProcess())
    told = sampling.model_dump(mode="json", exclude={"noise"}, exclude_none=True)
    plan: Any = SimpleNamespace(
        image="16x16", told=told,
        path=Path("made"), bundle=SimpleNamespace(manifest=manifest), sampling=sampling, reference=None,
        options=Options(("diffusers",), images=2, batches=(1, 4)), checkpoint=None,
        record={"stages_s": {"originals": 10.0}, "recipe": {"evaluate": {}}},
        missing={"ddim50": {"reason": "needs torch", "install": None}},
        requests=lambda start, count: (["a"] * count, list(range(count))),
    )  # fmt: skip
    bundle = _measured(BUNDLE, (0.5, 0.5), cost={"multiply_adds": 5, "parameters": 2})
    peer = _measured("diffusers", (1.0, 2.0), images=2)
    images = np.concatenate([each.images for each in peer.drawn])
    results = Results({BUNDLE: bundle, "diffusers": peer}, {"x": "broke"}, images, beside={"diffusers": bundle})
    document = make_document(plan, results, 0.1, Peaks(fp32=19.0, bf16=63.0, int8=95.0, memory=6.0))
    assert document.ratios["diffusers"].model_dump() == {"median": 3.0, "min": 2.0, "max": 4.0, "pairs": 2}
    assert document.break_even == {"diffusers": 10}
    assert document.batch_ratios["diffusers"]["4"].median == 3.0
    assert document.component_ratios["diffusers"]["denoiser"].median == 3.0
    assert document.extrapolated["ddpm1000"].evaluations == 8  # two a step
    assert document.bundle.cost and document.bundle.cost.multiply_adds == 5
    quality = document.sides["diffusers"].quality
    assert quality and quality.psnr_mean and quality.psnr_mean.value == MAX_PSNR and quality.clip_delta_mean is None
    assert document.command == "slipcast bench made --against diffusers --images 2 --batch 1,4"
    assert parse_document(json.dumps(document.plain())) == document
    assert "files" not in document.plain()
    assert "missing  ddim50: needs torch" in render_table(document.plain())
    assert "at most 19 fp32, 63 bf16, 95 int8 Gop/s, 6 GB/s" in render_table(document.plain())
    assert document.host.cpu == this_processor()
    assert "63.0 bf16" in render_page(document)
    assert "broke" in render_page(document)


def test_peaks_of_this_host() -> None:
    peaks = measure_peaks()
    assert min(peaks.model_dump().values()) > 0
