"""Metrics of pictures, and how sure they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slipcast.bundle.manifest import Metrics
from slipcast_compiler.judge.metrics import (
    DISTRACTORS,
    MAX_PSNR,
    STATISTICS,
    Reference,
    choose_captions,
    flip,
    interval,
    intervals,
    psnr,
    retrieved,
    summarise,
)

RNG = np.random.default_rng(0)
Array = np.ndarray[Any, Any]


def _pictures(count: int = 3) -> Array:
    return RNG.random((count, 32, 32, 3), dtype=np.float32)


def _unit(*rows: tuple[float, ...]) -> Array:
    return np.array(rows, np.float32) / np.linalg.norm(np.array(rows), axis=-1, keepdims=True).astype(np.float32)


def test_every_statistic_is_a_field_of_the_manifest() -> None:
    assert set(STATISTICS) == set(Metrics.model_fields)


def test_equal_pictures() -> None:
    images = _pictures()
    metrics = Reference(images, "abc").measure(images)
    assert (metrics.psnr_worst, metrics.ssim_worst, metrics.flip_mean) == (MAX_PSNR, pytest.approx(1.0), 0.0)
    assert metrics.clip_delta_mean is metrics.lpips_mean is metrics.retrieval_precision is None


def test_known_differences() -> None:
    images = _pictures() * 0.5
    shifted = images.copy()
    shifted[1] += 0.1
    samples = Reference(images, "abc").sample(shifted)
    scores = {"clip_before": np.array([0.8, 0.9, 1.0]), "clip": np.array([0.8, 0.45, 1.0])}
    metrics = summarise({**samples, **scores})
    assert metrics.psnr_worst == pytest.approx(20.0, abs=1e-3)
    assert metrics.psnr_mean == pytest.approx((20 + 2 * MAX_PSNR) / 3, abs=1e-3)
    assert metrics.clip_delta_worst == pytest.approx(-0.5)
    assert metrics.clip_delta_mean == pytest.approx(2.25 / 2.7 - 1)
    better = summarise({"clip_before": np.array([-0.2, -0.4]), "clip": np.array([-0.1, -0.35])})
    assert better.clip_delta_mean == pytest.approx(0.25)  # also where scores are below zero


def test_flip_of_black_and_white_is_nearly_the_largest_there_is() -> None:
    black, white = np.zeros((2, 64, 64, 3), np.float32) + np.array([0, 1], np.float32)[:, None, None, None]
    assert flip(black, white) == flip(white, black) == pytest.approx(0.967, abs=5e-4)
    # stripes of one pixel, which nobody resolves from where FLIP looks on
    stripes = np.tile(np.array([0.0, 1.0], np.float32)[:, None, None], (32, 64, 3))
    assert flip(stripes, stripes[::-1]) < flip(np.repeat(stripes[:8], 8, 0), np.repeat(stripes[1:9], 8, 0))


def test_what_is_not_finite_is_nan_in_every_metric_of_the_set() -> None:
    images = _pictures()
    for value in (np.nan, np.inf):
        found = images.copy()
        found[1, 3, 4, 0] = value
        metrics = Reference(images, "abc").measure(found)
        for name in ("psnr_mean", "psnr_worst", "ssim_mean", "ssim_worst", "flip_mean"):
            assert np.isnan(getattr(metrics, name)), name
        assert np.isnan(psnr(images[1], found[1])) or value == np.inf
        assert psnr(images[1], found[1]) != MAX_PSNR
        assert not intervals(Reference(images, "abc").sample(found))


def test_retrieval_counts_the_nearest_caption() -> None:
    own = _unit((1, 0), (0, 1), (-1, 0))
    pictures = _unit((1, 0.1), (1, 0.9), (-1, 0.2))
    right = retrieved(pictures, own, own)
    assert right is not None
    assert right.tolist() == [True, False, True]


def test_retrieval_among_captions_that_are_the_same() -> None:
    own = _unit((1, 0), (1, 0), (0, 1))
    right = retrieved(own, own, np.concatenate([own, own]))
    assert right is not None
    assert right.all()
    assert retrieved(own[:2], own[:2], own[:2]) is None  # nothing to choose from
    assert retrieved(own, own, own[:0]) is None
    # but a scorer that cannot tell two different captions apart does not retrieve
    right = retrieved(_unit((1, 1)), _unit((1, 0)), _unit((0, 1)))
    assert right is not None
    assert not right.any()


def test_captions_are_few_distinct_and_always_the_same() -> None:
    prompts = [f"prompt {i % 200}" for i in range(400)]
    chosen = choose_captions(prompts)
    assert len(set(chosen)) == len(chosen) == DISTRACTORS
    assert chosen == choose_captions(prompts[::-1])
    assert choose_captions(["b", "a", "b"]) in {("a", "b"), ("b", "a")}


def test_interval_holds_the_mean_and_repeats() -> None:
    sample = RNG.normal(10.0, 1.0, 50)
    found = interval([sample], lambda x: x.mean(-1), seed=3)
    assert found == interval([sample], lambda x: x.mean(-1), seed=3)
    assert found["value"] == pytest.approx(sample.mean())
    assert found["low"] < found["value"] < found["high"]
    # the textbook's 2 * 1.96 * s / sqrt(n)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * sample.std() / 50**0.5, rel=0.1)


def test_interval_keeps_pairs_together() -> None:
    before = RNG.random(20) + 1
    found = intervals({"clip_before": before, "clip": before * 0.9})
    assert found["clip_delta_mean"] == pytest.approx((-0.1, -0.1))
    assert found["clip_score_mean"][1] - found["clip_score_mean"][0] > 0.1


def test_intervals_narrow_with_the_number_of_images() -> None:
    few, many = (intervals({"psnr": RNG.normal(30.0, 3.0, count)})["psnr_mean"] for count in (8, 512))
    assert few[1] - few[0] > 3 * (many[1] - many[0])
    assert intervals({"psnr": np.array([30.0])}) == {}
    assert set(intervals({"psnr": np.array([30.0, 31.0])})) == {"psnr_mean"}  # and none of the worst
