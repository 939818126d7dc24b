"""Metrics, gate and scorer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from slipcast.errors import RecipeError
from slipcast.manifest import Metrics, Quality
from slipcast_compiler.evaluate import MAX_PSNR, Originals, Run, Scorer, apply_gate, compare, judge
from slipcast_compiler.recipe import GateTable

RNG = np.random.default_rng(0)


def _pictures(count: int = 3) -> np.ndarray[Any, Any]:
    return RNG.random((count, 32, 32, 3), dtype=np.float32)


def _run(images: np.ndarray[Any, Any]) -> Run:
    return Run(images, (1.0, 3.0, 2.0), 0.1, 100.0, {})


def _quality(**values: float) -> Quality:
    return Quality(images=1, noise_floor={"precision": Metrics(psnr_worst=40.0), "seed": Metrics()}, **values)


def test_equal_pictures() -> None:
    images = _pictures()
    metrics = compare(images, images, None, None)
    assert (metrics.psnr_worst, metrics.ssim_worst) == (MAX_PSNR, pytest.approx(1.0))
    assert metrics.clip_delta_mean is metrics.lpips_mean is None


def test_known_differences() -> None:
    images = _pictures() * 0.5
    shifted = images.copy()
    shifted[1] += 0.1
    metrics = compare(images, shifted, np.array([0.8, 0.9, 1.0], np.float32), np.array([0.8, 0.45, 1.0], np.float32))
    assert metrics.psnr_worst == pytest.approx(20.0, abs=1e-3)
    assert metrics.psnr_mean == pytest.approx((20 + 2 * MAX_PSNR) / 3, abs=1e-3)
    assert metrics.clip_delta_worst == pytest.approx(-0.5)
    assert metrics.clip_delta_mean == pytest.approx(2.25 / 2.7 - 1)


def test_noise_floors_come_from_the_unchanged_model() -> None:
    images = _pictures()
    originals = Originals(("a", "b", "c"), (0, 1, 2), images, images + 0.01, _pictures())
    quality = judge(originals, _run(images), None)
    assert quality.psnr_worst == MAX_PSNR
    assert quality.noise_floor["precision"].psnr_worst == pytest.approx(40.0, abs=0.01)
    assert quality.noise_floor["seed"].psnr_mean is None


@pytest.mark.parametrize(
    ("gate", "values", "passed"),
    [
        ({"clip_drop": 0.02}, {"clip_delta_mean": -0.019}, True),
        ({"clip_drop": 0.02}, {"clip_delta_mean": -0.021}, False),
        ({"clip_drop": 0.02}, {"clip_delta_mean": 0.5}, True),
        ({"clip_drop": 0.02}, {}, False),  # a limit on what was not run does not pass
        ({"psnr": 30.0}, {"psnr_worst": 29.9}, False),
        ({"psnr": 30.0}, {"psnr_worst": 30.0}, True),
        ({"ssim": 0.9}, {"ssim_worst": 0.89}, False),
        ({}, {"clip_delta_mean": -1.0}, None),
    ],
)
def test_gate(gate: dict[str, float], values: dict[str, float], passed: bool | None) -> None:
    rows = apply_gate(GateTable(**gate), _quality(**values))
    assert [row.passed for row in rows if row.passed is not None] == ([] if passed is None else [passed])
    assert all(row.limit is None for row in rows if row.passed is None)


def _scenes() -> ModuleType:
    path = Path("recipes/models/training/scenes.py")
    spec = importlib.util.spec_from_file_location("scenes", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenes"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_scorer_knows_real_pictures() -> None:
    scenes, rng = _scenes(), np.random.default_rng(5)
    drawn = [scenes.sample_scene(rng) for _ in range(16)]
    images = np.stack([scenes.render(scene, rng) for scene in drawn]).astype(np.float32) / 255
    captions = [scenes.caption(scene) for scene in drawn]
    scorer = Scorer("models/shapes-scorer", Path("recipes"))
    scores = scorer(images, captions)
    assert scores.mean() > 0.93  # the card says 0.954 on 64 pictures
    assert scorer(images, captions[1:] + captions[:1]).mean() < scores.mean() - 0.2


def test_scorer_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.scorer"):
        Scorer("./nowhere", Path("recipes"))
