"""What a captured pipeline drew, and what its bundle draws, compared: pictures, videos, sounds; several variants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from slipcast.bundle.program import Output
from slipcast_compiler.judge.captured import PipelineOriginals, VariantOriginals
from slipcast_compiler.judge.gate import apply_gate, missed
from slipcast_compiler.judge.judges import Judges, open_judges
from slipcast_compiler.judge.metrics import MAX_PSNR
from slipcast_compiler.judge.originals import Run
from slipcast_compiler.judge.programs import ProgramJudge
from slipcast_compiler.recipe.recipe import EvaluateTable, GateTable

RNG = np.random.default_rng(0)
CAPTIONS = ("a red circle", "a blue star", "a green square")
Array = np.ndarray[Any, Any]


def run(images: Array) -> Run:
    return Run(images, (1.0,) * len(images), 0.1, 100.0, {})


def originals(images: Array, prompts: tuple[str, ...] = CAPTIONS) -> VariantOriginals:
    """Of what a pipeline returns, channels first."""
    return VariantOriginals(prompts[: len(images)], tuple(range(len(images))), run(images), {})


def laid(images: Array) -> Run:
    """As a bundle draws them, channels last."""
    return run(np.moveaxis(images, -3, -1))


def judge(images: Array, kind: Output) -> ProgramJudge:
    return ProgramJudge(PipelineOriginals((originals(images),)), kind)


@pytest.fixture(scope="module")
def scorer() -> Judges:
    table = EvaluateTable(scorer="models/shapes-scorer")
    return open_judges(table, ROOT / "recipes", CAPTIONS)


def test_every_frame_of_a_video_is_a_picture() -> None:
    video = RNG.random((2, 3, 1, 16, 16), np.float32)
    found = video.copy()
    found[1, 2] = 0.5
    quality, _ = judge(video, "frames")([laid(found)])
    assert quality.images == 6
    assert quality.psnr_worst and quality.psnr_mean
    assert quality.psnr_worst < 20 < quality.psnr_mean


def test_of_a_sound_psnr_alone_is_run() -> None:
    sound = 50 * RNG.standard_normal((2, 1, 40)).astype(np.float32)
    near, _ = judge(sound, "array")([run(sound[:, None] * np.float32(1.001))])
    assert near.psnr_worst == pytest.approx(70, abs=5)
    assert near.ssim_mean is None and near.images == 2
    broken, _ = judge(sound, "array")([run(sound * np.nan)])
    assert broken.psnr_worst is not None and np.isnan(broken.psnr_worst)


def test_the_gate_is_asked_of_all_variants_together(scorer: Judges) -> None:
    """Each picture against its own prompt; those out of the family apart, and without limits."""
    small, large = RNG.random((3, 3, 32, 32), np.float32), RNG.random((2, 3, 32, 48), np.float32)
    strangers = RNG.random((1, 3, 32, 32), np.float32)
    drawn = PipelineOriginals((originals(small), originals(large)), originals(strangers, ("a dog",)))
    judge = ProgramJudge(drawn, "image", scorer)
    quality, metrics = judge([laid(small), laid(large), laid(strangers)])
    assert (quality.images, quality.psnr_worst, quality.clip_delta_worst) == (5, MAX_PSNR, 0)
    assert quality.clip_score_mean == quality.original.clip_score_mean is not None
    assert quality.intervals["clip_delta_mean"] == (0, 0)
    assert scorer.scorer and quality.scorer_sha256 == scorer.scorer.sha256
    assert quality.retrieval_captions == len(CAPTIONS)
    scores = scorer.scorer(np.moveaxis(small, 1, -1), CAPTIONS)
    assert metrics[0].clip_score_mean == pytest.approx(scores.mean(), abs=1e-6)
    spoiled = strangers * np.float32(0.1)
    quality, _ = judge([laid(small), laid(large[::-1]), laid(spoiled)])
    assert quality.psnr_worst and quality.psnr_worst < 20
    assert quality.out_of_family and quality.out_of_family.images == 1
    assert quality.out_of_family.psnr_worst and quality.out_of_family.psnr_worst < 20
    assert quality.out_of_family.clip_score_mean != quality.out_of_family.original.clip_score_mean
    assert len(missed({"t": apply_gate(GateTable(psnr=30.0, clip_drop_worst=5.0), quality)})) == 1
    assert missed({"t": apply_gate(GateTable(clip_drop_worst=0.0), quality)})


def test_a_caption_is_said_of_each_frame(scorer: Judges) -> None:
    video = RNG.random((2, 2, 3, 32, 32), np.float32)
    quality, _ = ProgramJudge(PipelineOriginals((originals(video),)), "frames", scorer)([laid(video)])
    frames = np.moveaxis(video, -3, -1).reshape(4, 32, 32, 3)
    assert scorer.scorer
    scores = scorer.scorer(frames, [CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[1]])
    assert quality.clip_score_mean == pytest.approx(scores.mean(), abs=1e-6)
