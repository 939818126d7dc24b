"""Numbers of which a call lists several: which calls they are, what is common to their programs, and bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import bundle_of, distance
from diffusers import DDIMScheduler
from test_refusals import Denoiser, Plain
from tiny import call_of, open_pipeline

import slipcast
from slipcast.errors import RecipeError, RequestError
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.find import find_each, find_for
from slipcast_compiler.capture.listed import combinations
from slipcast_compiler.capture.parts import describe_parts
from slipcast_compiler.recipe.targets import TargetTable

PROMPT = "a large blue star on a black background"


class Asked:
    """A pipeline as its signature has it."""

    def __call__(
        self, num_inference_steps: int = 50, guidance_scale: float = 5.0, height: int | None = None,
        width: int | None = None, sigmas: list[float] | None = None, class_labels: int | list[int] = 0, eta=0.0,
        clean: bool = False, text: str = "",
    ) -> None:  # fmt: skip
        pass


def test_all_combinations_of_numbers_and_pairs_of_sizes() -> None:
    given = {"guidance_scale": [5.0, 1.0], "num_inference_steps": 4, "height": [32, 48], "width": [32, 64], "eta": [0]}
    calls = combinations(Asked(), given)
    assert [(call["height"], call["width"], call["guidance_scale"]) for call in calls] == [
        (32, 32, 5.0), (32, 32, 1.0), (48, 64, 5.0), (48, 64, 1.0),
    ]  # fmt: skip
    assert all(list(call) == list(given) and call["eta"] == 0 and call["num_inference_steps"] == 4 for call in calls)
    assert combinations(Asked(), {"height": [32, 48], "width": 64})[1] == {"height": 48, "width": 64}
    assert combinations(Asked(), {"height": [32, 32], "width": [32, 64]})[1] == {"height": 32, "width": 64}


def test_arguments_that_are_lists_by_themselves_stay() -> None:
    given = {"sigmas": [1.0, 0.5], "class_labels": [1, 2], "clean": [True], "text": ["a"], "unknown": [1, 2]}
    assert combinations(Asked(), given) == (given,)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_inference_steps": []}, "num_inference_steps: a list means all of these"),
        ({"num_inference_steps": [4, 4]}, "different numbers"),
        ({"num_inference_steps": [4, "8"]}, "numbers"),
        ({"guidance_scale": [1.0, True]}, "numbers"),
        ({"height": [32, 48], "width": [32, 48, 64]}, "pairs, by place"),
        ({"height": [32, 32], "width": [48, 48]}, "a pair twice"),
        ({"height": [32, 32], "width": 48}, "different numbers"),
    ],
)
def test_lists_that_say_nothing(given: Any, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        combinations(Asked(), given)
    assert says in str(refused.value)


def plain() -> Plain:
    return Plain(Denoiser(), DDIMScheduler())


def test_other_numbers_of_steps_are_other_rows_of_the_same_parts() -> None:
    pipe = plain()
    few, many = find_each(pipe, [{"num_inference_steps": 2}, {"num_inference_steps": 4}])
    assert [part.name for part in few.cut.parts] == [part.name for part in many.cut.parts]
    assert all(one is other for one, other in zip(few.cut.parts, many.cut.parts, strict=True))
    table = next(part.table for part in few.cut.parts if part.name == "update")
    rows = [[use.row for use in found.cut.uses if use.part == "update"] for found in (few, many)]
    assert rows == [[0, 1], [2, 3, 4, 1]] and {len(each) for _, each in table} == {5}  # the last step is the same


def test_steps_that_are_the_same_have_one_row() -> None:
    one, other = find_each(plain(), [{"num_inference_steps": 3}, {"num_inference_steps": 3}])
    assert [use.row for use in one.cut.uses] == [use.row for use in other.cut.uses]


def test_a_bundle_of_several_numbers_of_steps(tmp_path: Path) -> None:
    pipe = plain()
    calls = [lambda prompt, n=n: make_call(pipe, {"num_inference_steps": n}, prompt) for n in (2, 4)]
    bundle = bundle_of(pipe, "plain", calls, tmp_path)
    with slipcast.load(bundle) as loaded:
        assert set(loaded.manifest.components) == {"start", "denoiser", "update"}
        for steps in (2, 4):
            wanted = pipe(**make_call(pipe, {"num_inference_steps": steps}, "", 3))["x"]
            found = loaded(seed=3, num_inference_steps=steps, output_type="np")
            np.testing.assert_allclose(found.images[0], wanted, rtol=1e-5, atol=1e-6)
            assert found.steps == (steps,)
        with pytest.raises(RequestError) as refused:
            loaded(num_inference_steps=3)
        assert refused.value.expected == "2 or 4"


@pytest.mark.slow
def test_a_bundle_of_sizes_and_guidance(tmp_path: Path) -> None:
    """With guidance of 1 the pipeline leaves the negative prompt out: its denoiser is another, of one row."""
    pipe, base = open_pipeline("stable_diffusion_xl"), {"height": [32, 64], "width": [32, 48]}
    given = combinations(pipe, {**base, "guidance_scale": [5.0, 1.0], "negative_prompt": "blurry"})

    def called(each: Any, prompt: str, seed: int = 1) -> dict[str, Any]:
        return call_of("stable_diffusion_xl", prompt, seed) | each

    calls = [lambda prompt, each=each: called(each, prompt) for each in given]
    tables = TargetTable(engine="onnxruntime"), TargetTable(engine="openvino")
    bundle = bundle_of(pipe, "sizes", calls, tmp_path, *tables)
    for target in ("onnxruntime", "openvino"):
        with slipcast.load(bundle, target=target) as loaded:
            for each in given:
                asked = {name: each[name] for name in ("height", "width", "guidance_scale")}
                found = loaded(PROMPT, seed=7, output_type="np", **asked).images
                with torch.no_grad():
                    wanted = pipe(**called(each, PROMPT, 7))["images"].numpy()
                assert distance(found[0], wanted)["psnr"] >= 60


def test_what_is_said_of_parts_that_programs_of_other_forms_share() -> None:
    """Their values have other numbers in each."""
    pipe = open_pipeline("stable_diffusion")
    given = combinations(pipe, {"guidance_scale": [5.0, 1.0], "negative_prompt": "blurry"})
    calls = [lambda prompt, each=each: call_of("stable_diffusion", prompt, 1) | each for each in given]
    parts = describe_parts(find_for(pipe, calls), pipe)
    assert parts["denoiser"]["reads"].items() >= {"noise": 1, "prompt": 1}.items()
    assert parts["decoder"]["reads"] == {"noise": 1} and {"denoiser_2", "conditioning_2"} <= set(parts)
