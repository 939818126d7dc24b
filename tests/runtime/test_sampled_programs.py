"""A captured program whose steps slipcast's samplers take: early exit, image by image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import programs
import pytest
from fakes import Fakes
from programs import cached, document, looped, unguided, write_program

import slipcast
from conftest import call_cli
from slipcast.errors import ArtifactError, RequestError
from slipcast.run.program import ProgramPipeline

PROMPTS, STEPS, SEEDS = ["a red circle", "a blue star"] * 2, 12, [3, 4, 5, 6]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return programs.use(fakes.install(monkeypatch))


def bundle(root: Path, threshold: float | None, **sampling: Any) -> Path:
    changes = looped(STEPS, **sampling)
    if threshold is None:
        return write_program(root, {}, **changes)
    targets = [target | {"early_exit": threshold} for target in document(root.parent, **changes)["targets"]]
    return write_program(root, {}, **changes, targets=targets, requires=["program", "early_exit"])


def draw(pipe: Any, places: list[int], **request: Any) -> Any:
    return pipe([PROMPTS[i] for i in places], seed=[SEEDS[i] for i in places], output_type="np", **request)


def threshold_between(tmp_path: Path, **sampling: Any) -> float:
    """At which some of the images stop before the end, and not all at once: found by trying."""
    for i, threshold in enumerate(np.geomspace(1e-4, 1.0, 60)):
        with slipcast.load(bundle(tmp_path / f"try{i}", float(threshold), **sampling)) as pipe:
            steps = draw(pipe, [0, 1, 2, 3]).steps
        if min(steps) < STEPS and len(set(steps)) > 1:
            return float(threshold)
    raise AssertionError("no threshold tells the images apart")


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_each_image_stops_by_itself(tmp_path: Path, engines: Fakes, sampler: str) -> None:
    threshold = threshold_between(tmp_path, sampler=sampler)
    with slipcast.load(bundle(tmp_path / "b", threshold, sampler=sampler)) as pipe:
        assert isinstance(pipe, ProgramPipeline)
        seen: list[int] = []
        engines.calls.clear()
        out = draw(pipe, [0, 1, 2, 3], callback_on_step_end=lambda _, step, steps: seen.append(step))
        evaluations = [name for name, _ in engines.calls if name == "denoiser"]
        assert seen == list(range(max(out.steps))) and min(out.steps) < STEPS
        assert len(evaluations) < 4 * STEPS * (2 if sampler == "heun" else 1)
        if sampler == "euler":
            assert len(evaluations) == sum(out.steps)
        for i in range(4):
            alone = draw(pipe, [i])
            np.testing.assert_array_equal(alone.images[0], out.images[i])
            assert alone.steps == (out.steps[i],)


def test_what_is_shared_is_evaluated_for_whoever_is_left(tmp_path: Path, engines: Fakes) -> None:
    """And it is said how many steps each took, and where images stop, by `inspect`."""
    threshold = threshold_between(tmp_path)
    path = bundle(tmp_path / "b", threshold)
    with slipcast.load(path) as pipe:
        out, whole = draw(pipe, [0, 1, 2, 3]), draw(slipcast.load(bundle(tmp_path / "all", None)), [0, 1, 2, 3])
    assert whole.steps == (STEPS,) * 4
    for steps, image, wanted in zip(out.steps, out.images, whole.images, strict=True):
        assert (steps < STEPS) == bool((image != wanted).any())
        assert np.abs(image - wanted).max() < 0.5
    said = call_cli("inspect", str(path)).stdout
    assert f"early exit where a clean image changes by {threshold:.3g} or less" in said


def test_other_numbers_of_steps_take_them_all(tmp_path: Path, engines: Fakes) -> None:
    with slipcast.load(bundle(tmp_path / "b", 10.0)) as pipe:
        assert draw(pipe, [0, 1]).steps == (2, 2)
        assert draw(pipe, [0, 1], num_inference_steps=7).steps == (7, 7)


def test_a_manifest_names_it_under_requires(tmp_path: Path, engines: Fakes) -> None:
    for place, (changes, early, requires, says) in enumerate(
        (
            (looped(STEPS), 0.1, ["program"], "requires has to name early_exit and program"),
            (looped(STEPS), None, ["program", "early_exit"], "requires has to name program, and nothing else"),
            ({}, 0.1, ["program", "early_exit"], "program has no loop"),
        )
    ):
        targets = [target | {"early_exit": early} for target in document(tmp_path, **changes)["targets"]]
        table = {} if changes else programs.TABLE
        path = write_program(tmp_path / str(place), table, **changes, targets=targets, requires=requires)
        with pytest.raises(ArtifactError, match=says):
            slipcast.load(path)


MASK = [True, False, True, False, False]


def test_shallow_steps_go_on_from_the_last_full_one(tmp_path: Path, engines: Fakes) -> None:
    """Each image from its own; a run of other steps has full ones alone."""
    with slipcast.load(write_program(tmp_path / "b", {}, **cached(MASK))) as pipe:
        engines.calls.clear()
        together = draw(pipe, [0, 1])
        wanted = ["denoiser" if full else "denoiser_shallow" for full in MASK for _ in range(2)]
        assert [name for name, _ in engines.calls if name.startswith("denoiser")] == wanted
        for i in range(2):
            np.testing.assert_array_equal(draw(pipe, [i]).images[0], together.images[i])
        engines.calls.clear()
        draw(pipe, [0], num_inference_steps=4)
        assert [name for name, _ in engines.calls].count("denoiser") == 4
    with slipcast.load(write_program(tmp_path / "whole", {}, **looped(len(MASK)))) as pipe:
        assert (draw(pipe, [0]).images[0] != together.images[0]).any()  # whose timesteps are the full ones'
    said = call_cli("inspect", str(tmp_path / "b")).stdout
    assert "caching      2 of 5 steps in full: FsFss" in said


def test_images_that_stopped_have_no_features(tmp_path: Path, engines: Fakes) -> None:
    changes = cached([True] * (STEPS - 3) + [False, True, False])
    for i, threshold in enumerate(np.geomspace(1e-4, 1.0, 60)):
        targets = [target | {"early_exit": float(threshold)} for target in document(tmp_path, **changes)["targets"]]
        asked = {**changes, "targets": targets, "requires": ["program", "caching", "early_exit"]}
        with slipcast.load(write_program(tmp_path / f"try{i}", {}, **asked)) as pipe:
            out = draw(pipe, [0, 1, 2, 3])
            if len(set(out.steps)) > 1:
                for place in range(4):
                    alone = draw(pipe, [place])
                    np.testing.assert_array_equal(alone.images[0], out.images[place])
                return
    raise AssertionError("no threshold tells the images apart")


WRONG = {
    "not required": (lambda m: m.update(requires=["program"]), "requires has to name caching and program"),
    "mask": (lambda m: m["program"]["loop"]["shallow"].update(mask=[True, False]), "shallow.mask is for 2 steps"),
    "first": (lambda m: m["program"]["loop"]["shallow"].update(mask=[False] * 5), "it has to be full"),
    "output": (
        lambda m: m["program"]["loop"]["shallow"]["call"].update(outputs={"prediction": "other"}),
        "shallow.call has to make the output",
    ),
    "no feature": (
        lambda m: m["program"]["loop"]["shallow"]["call"]["inputs"].update(feature="noise"),
        "shallow.call reads no feature",
    ),
    "unknown": (
        lambda m: m["program"]["loop"]["shallow"]["call"]["inputs"].update(sample="nothing"),
        "loop.shallow.call reads 'nothing'",
    ),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_what_a_shallow_call_may_not_be(change: Any, says: str, tmp_path: Path, engines: Fakes) -> None:
    path = write_program(tmp_path / "b", {}, **cached(MASK))
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=says):
        slipcast.load(path)


def test_steps_outside_of_the_interval_have_no_guidance(tmp_path: Path, engines: Fakes) -> None:
    """Each image's by itself; a run may have others, or none at all."""
    with slipcast.load(write_program(tmp_path / "b", {}, **unguided(5, [0.5, 1.0]))) as pipe:
        engines.calls.clear()
        together = draw(pipe, [0, 1])
        called = [name for name, _ in engines.calls if name.startswith("denoiser")]
        assert called == ["denoiser"] * 6 + ["denoiser_2"] * 4  # the first three sigmas are 1, 0.75, 0.5
        for place in range(2):
            np.testing.assert_array_equal(draw(pipe, [place]).images[0], together.images[place])
        engines.calls.clear()
        draw(pipe, [0], num_inference_steps=2, negative_prompt="black")
        assert [name for name, _ in engines.calls if name.startswith("denoiser")] == ["denoiser", "denoiser_2"]
        engines.calls.clear()
        draw(pipe, [0], guidance_scale=1.0)
        assert "denoiser" not in {name for name, _ in engines.calls}
        with pytest.raises(RequestError, match="a number from 1 to"):
            draw(pipe, [0], guidance_scale=0.5)
    assert "guidance     at sigma 0.5 to 1; else denoiser_2" in call_cli("inspect", str(tmp_path / "b")).stdout


WRONG_WITHOUT = {
    "not required": (lambda m: m.update(requires=["program"]), "requires has to name guidance_interval and program"),
    "none": (lambda m: m["program"]["loop"].update(unguided=[]), "there is no evaluation without guidance"),
    "output": (
        lambda m: m["program"]["loop"]["unguided"][0].update(outputs={"prediction": "other"}),
        "which none of its calls without guidance makes",
    ),
    "reuse": (lambda m: m["program"]["loop"]["sampling"].update(guidance_reuse=1), "nothing is taken again"),
    "unknown": (
        lambda m: m["program"]["loop"]["unguided"][0]["inputs"].update(sample="nothing"),
        r"loop.unguided\[0\] reads 'nothing'",
    ),
}


@pytest.mark.parametrize(("change", "says"), WRONG_WITHOUT.values(), ids=WRONG_WITHOUT)
def test_what_an_evaluation_without_guidance_may_not_be(change: Any, says: str, tmp_path: Path, engines: Fakes) -> None:
    path = write_program(tmp_path / "b", {}, **unguided(5, [0.5, 1.0]))
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=says):
        slipcast.load(path)
