"""Metrics, gate and scorer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from lpips_weights import write_lpips

from slipcast.bundle.manifest import Metrics, Quality
from slipcast.errors import RecipeError
from slipcast_compiler.judge.evaluate import Judge
from slipcast_compiler.judge.gate import LIMITS, apply_gate, missed
from slipcast_compiler.judge.judges import Judges, check_judges, compare
from slipcast_compiler.judge.metrics import MAX_PSNR, Reference
from slipcast_compiler.judge.originals import Originals, Run
from slipcast_compiler.judge.scorer import Scorer
from slipcast_compiler.recipe.family import Family
from slipcast_compiler.recipe.recipe import EvaluateTable, GateTable

RNG = np.random.default_rng(0)
NAN = float("nan")


def _pictures(count: int = 3) -> np.ndarray[Any, Any]:
    return RNG.random((count, 32, 32, 3), dtype=np.float32)


def _run(images: np.ndarray[Any, Any]) -> Run:
    return Run(images, (1.0, 3.0, 2.0), 0.1, 100.0, {})


def _quality(**values: float) -> Quality:
    return Quality(images=1, noise_floor={"precision": Metrics(psnr_worst=40.0), "seed": Metrics()}, **values)


def _judge(images: np.ndarray[Any, Any], count: int | None = None) -> Judge:
    count = len(images) if count is None else count
    prompts = tuple(f"prompt {i}" for i in range(len(images)))
    return Judge(Originals(prompts, tuple(range(len(images))), images, images[:count] + 0.01, _pictures(count)))


def test_noise_floors_come_from_the_unchanged_model() -> None:
    images = _pictures()
    quality = _judge(images)(_run(images))
    assert quality.psnr_worst == MAX_PSNR
    assert quality.noise_floor["precision"].psnr_worst == pytest.approx(40.0, abs=0.01)
    assert quality.noise_floor["seed"].psnr_mean is None
    assert quality.intervals["psnr_mean"] == (MAX_PSNR, MAX_PSNR)
    assert quality.scorer_sha256 is quality.lpips_sha256 is quality.out_of_family is None


def test_prompts_out_of_the_family_are_apart() -> None:
    images = _pictures(5)
    found = images.copy()
    found[3:] = 0
    quality = _judge(images, 3)(_run(found))
    assert (quality.images, quality.psnr_worst) == (3, MAX_PSNR)
    assert quality.out_of_family
    assert quality.out_of_family.images == 2
    assert quality.out_of_family.psnr_worst and quality.out_of_family.psnr_worst < 10
    assert missed({"t": apply_gate(GateTable(psnr=50.0, ssim=0.9), quality)}) == []


def test_row_34_a_picture_out_of_the_family_has_to_be_one() -> None:
    images = _pictures(5)
    found = images.copy()
    found[4, 0, 0, 0] = NAN
    lines = missed({"t": apply_gate(GateTable(), _judge(images, 3)(_run(found)))})
    assert lines == ["t: PSNR out of the family, worst image (dB) is nan, limit none"]


def test_broken_pictures_of_the_original_are_no_noise_floor(caplog: pytest.LogCaptureFixture) -> None:
    images = _pictures()
    originals = Originals(("a", "b", "c"), (0, 1, 2), images, images * NAN, images)
    quality = Judge(originals)(_run(images))
    assert quality.noise_floor["precision"] == Metrics()
    assert "a noise floor is left out" in caplog.text
    assert quality.psnr_worst == MAX_PSNR


@pytest.mark.parametrize(
    ("gate", "values", "passed"),
    [
        ({"clip_drop": 0.02}, {"clip_delta_mean": -0.019}, True),
        ({"clip_drop": 0.02}, {"clip_delta_mean": -0.021}, False),
        ({"clip_drop": 0.02}, {"clip_delta_mean": 0.5}, True),
        ({"clip_drop": 0.02}, {}, False),  # a limit on what was not run does not pass
        ({"clip_drop": 0.02}, {"clip_delta_mean": NAN}, False),
        ({"clip_drop_worst": 0.1}, {"clip_delta_worst": -0.11, "clip_delta_mean": 0.0}, False),
        ({"clip_drop_worst": 0.1}, {"clip_delta_worst": -0.09}, True),
        ({"retrieval_drop": 0.05}, {"retrieval_drop": 0.06}, False),
        ({"retrieval_drop": 0.05}, {"retrieval_drop": -0.5}, True),
        ({"lpips": 0.05}, {"lpips_mean": 0.06}, False),
        ({"lpips": 0.05}, {"lpips_mean": 0.04}, True),
        ({"lpips": 0.05}, {}, False),
        ({"psnr": 30.0}, {"psnr_worst": 29.9}, False),
        ({"psnr": 30.0}, {"psnr_worst": 30.0}, True),
        ({"ssim": 0.9}, {"ssim_worst": 0.89}, False),
        ({"psnr": 30.0}, {"psnr_worst": NAN}, False),
        ({"ssim": 0.9}, {"ssim_worst": NAN}, False),
        ({}, {"psnr_worst": NAN}, False),  # which no limit has to be set for
        ({}, {"clip_delta_mean": -1.0}, None),
    ],
)
def test_gate(gate: dict[str, float], values: dict[str, float], passed: bool | None) -> None:
    rows = apply_gate(GateTable(**gate), _quality(**values))
    assert [row.passed for row in rows if row.passed is not None] == ([] if passed is None else [passed])
    assert all(row.limit is None for row in rows if row.passed is None)
    assert len(missed({"t": rows})) == (passed is False)


def test_every_limit_is_checked() -> None:
    assert {field for _, field, _, _ in LIMITS} == set(GateTable.model_fields)


def _scenes() -> ModuleType:
    path = Path("recipes/models/training/scenes.py")
    spec = importlib.util.spec_from_file_location("scenes", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenes"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray[Any, Any], tuple[str, ...]]:
    """16 pictures as the scorer was trained on, with their captions."""
    scenes, rng = _scenes(), np.random.default_rng(5)
    chosen = [scenes.sample_scene(rng) for _ in range(16)]
    images = np.stack([scenes.render(scene, rng) for scene in chosen]).astype(np.float32) / 255
    return images, tuple(scenes.caption(scene) for scene in chosen)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer("models/shapes-scorer", Path("recipes"))


def test_scorer_knows_real_pictures(drawn: Any, scorer: Scorer) -> None:
    images, captions = drawn
    scores = scorer(images, captions)
    assert scores.mean() > 0.93  # the card says 0.954 on 64 pictures
    assert scorer(images, captions[1:] + captions[:1]).mean() < scores.mean() - 0.2


def test_scorer_gives_equal_texts_equal_embeddings(scorer: Scorer) -> None:
    long = "a large red circle " * 20  # cut after 32 tokens
    texts = ["a red circle", long + "on white", "a blue star", "a red circle", long + "on black", ""]
    found = scorer.embed_texts(texts)
    assert (found[0] == found[3]).all() and (found[1] == found[4]).all()
    assert len(np.unique(found, axis=0)) == 4
    assert found == pytest.approx(np.concatenate([scorer.embed_texts([text]) for text in texts]), abs=1e-5)
    assert len(scorer.sha256) == 64


@pytest.mark.parametrize("count", [1, 3, 16])
def test_a_caption_is_never_taken_for_another(count: int, drawn: Any, scorer: Scorer) -> None:
    images, captions = drawn
    reference = Reference(images[:count], captions[:count], scorer, None, captions + captions[:3])
    found = compare(reference.sample(images[:count]))["original"]
    assert found.retrieval_precision == 1.0


@pytest.mark.parametrize(
    ("gate", "label"),
    [
        ({"clip_drop_worst": 0.1}, "CLIP drop, worst"),
        ({"retrieval_drop": 0.05}, "Retrieval"),
        ({"psnr": 30.0}, "PSNR"),
        ({"ssim": 0.9}, "SSIM"),
    ],
)
def test_row_34_one_wrong_picture_misses_the_gate(
    gate: dict[str, float], label: str, drawn: Any, scorer: Scorer
) -> None:
    images, captions = drawn
    originals = Originals(captions, tuple(range(16)), images, images, images)
    judge = Judge(originals, Judges(scorer, None, captions * 2))  # each of them twice
    sound, found = judge(_run(images)), images.copy()
    assert sound.original.retrieval_precision == sound.retrieval_precision > 0.9
    assert missed({"t": apply_gate(GateTable(**gate), sound)}) == []
    found[5] = 1 - images[5]
    lines = missed({"t": apply_gate(GateTable(**gate), judge(_run(found)))})
    assert len(lines) == 1 and lines[0].startswith(f"t: {label}")
    found[5] = np.nan
    lines = missed({"t": apply_gate(GateTable(), judge(_run(found)))})
    assert any(line.startswith(f"t: {label}") and "is nan, limit none" in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "says", "closed", "sizes"),
    [
        ({"scorer": "nowhere"}, r"evaluate\.scorer does not exist", False, [(64, 64)]),
        ({"scorer": "models/shapes-scorer"}, r"evaluate\.scorer is for pictures", False, None),
        ({"lpips": "nowhere"}, r"evaluate\.lpips has no weights", False, [(64, 64)]),
        ({"lpips": "."}, r"evaluate\.lpips is for pictures", False, None),
        ({"lpips": "weights"}, "too small(.|\n)*24x64", False, [(64, 64), (24, 64)]),
        ({"out_of_family": ("a star",)}, "a closed family's bundle", True, [(64, 64)]),
        ({"out_of_family": ("a circle",)}, "a prompt is of the family", False, [(64, 64)]),
    ],
)
def test_what_cannot_judge_is_refused(
    asked: dict[str, Any], says: str, closed: bool, sizes: list[tuple[int, int]] | None, tmp_path: Path
) -> None:
    (tmp_path / "models").symlink_to(Path("recipes/models").resolve())
    (tmp_path / "weights").mkdir()
    write_lpips(tmp_path / "weights", "alex")
    table, family = EvaluateTable(**asked), Family("f", ("a circle",), ("a ring",), closed)
    with pytest.raises(RecipeError, match=says):
        check_judges(table, family, sizes, tmp_path)
    if not asked.get("lpips"):
        with pytest.raises(RecipeError, match="for a model with prompts"):
            check_judges(table, None, sizes, tmp_path)


def test_strangers_are_told() -> None:
    table, family = EvaluateTable(out_of_family=("a dog",)), Family("f", ("a circle",), ("a ring",), False)
    assert check_judges(table, family, None, Path()) == ("a dog",)


def test_scorer_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.scorer"):
        Scorer("./nowhere", Path("recipes"))
