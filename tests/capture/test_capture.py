"""Programs of tiny pipelines: replayed on other prompts and seeds they are the pipeline, and their loops roll."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pipelines import PIPELINES, call_of, open_pipeline, unet

from slipcast.errors import ArtifactError, RecipeError
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.open import find_pipeline, open_without_weights
from slipcast_compiler.capture.program import Call, Op, Program
from slipcast_compiler.capture.record import Recorder, capture
from slipcast_compiler.capture.replay import replay
from slipcast_compiler.capture.roll import roll
from slipcast_compiler.capture.run import capture_model
from slipcast_compiler.capture.shapes import META, run_for_shapes
from slipcast_compiler.capture.summary import render
from slipcast_compiler.capture.verify import verify

SHAPES = Path(__file__).parents[2] / "recipes" / "models" / "shapes"
ONE, OTHER = "a small red circle on white", "a large blue star on a black background"
# pipeline -> operators and calls of a step, and guidance
STEPS = {
    "stable_diffusion": (6, "u + 7.5 (c - u)"),
    "stable_diffusion_xl": (7, "u + 5 (c - u)"),
    "stable_diffusion_3": (6, "u + 7 (c - u)"),
    "flux": (1, None),
    "pixart_sigma": (7, "u + 4.5 (c - u)"),
    "z_image": (10, "c + 5 (c - u)"),
    "wan": (5, "u + 5 (c - u)"),
}


def _captured(name: str) -> Program:
    return capture(open_pipeline(name), call_of(name, ONE, 1))


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "wan"])
def test_a_program_is_the_pipeline_for_another_prompt_and_seed(name: str) -> None:
    verdict = verify(_captured(name), open_pipeline(name), call_of(name, OTHER, 7), call_of(name, OTHER, 7))
    assert verdict.error == 0.0 and verdict.holds and verdict.difference is None


def test_a_number_that_is_read_from_the_prompt_is_found_with_its_line() -> None:
    program = _captured("wan")  # which cuts embeddings at the mask's sum
    verdict = verify(program, open_pipeline("wan"), call_of("wan", OTHER, 7), call_of("wan", OTHER, 7))
    assert verdict.error is not None and verdict.error > 1e-3 and not verdict.holds
    assert verdict.difference and "aten::slice at diffusers/pipelines/wan/pipeline_wan.py:" in verdict.difference
    assert {guard.operator for guard in program.guards} == {"_local_scalar_dense"}
    assert all("pipeline_wan.py:" in guard.where for guard in program.guards)


@pytest.mark.parametrize("name", STEPS)
def test_the_loop_rolls(name: str) -> None:
    loop = roll(_captured(name))
    assert loop and loop.carried
    (phase,) = loop.phases
    assert len(phase.steps) == 3 and sum(phase.table) > 0
    assert (len(phase.steps[0].events), phase.guidance) == STEPS[name]


def test_guidance_that_ends_is_a_phase_of_its_own() -> None:
    pipe = open_pipeline("stable_diffusion")

    def end_guidance(this: Any, step: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            this._guidance_scale = 1.0
            given["prompt_embeds"] = given["prompt_embeds"][1:]
        return given

    callback = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    program = capture(pipe, call_of("stable_diffusion", ONE, 1) | callback)
    loop = roll(program)
    assert loop
    assert [(phase.first, len(phase.steps), phase.guidance) for phase in loop.phases] == [
        (0, 1, "u + 7.5 (c - u)"), (1, 2, None),
    ]  # fmt: skip


def test_an_image_that_the_call_is_given_is_a_source() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pipe(open_pipeline("stable_diffusion"))
    pipe.set_progress_bar_config(disable=True)

    def call(seed: int) -> dict[str, Any]:
        image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
        given = call_of("stable_diffusion", ONE, seed) | {"image": image, "strength": 0.8, "num_inference_steps": 4}
        return {key: value for key, value in given.items() if key not in ("height", "width")}

    program = capture(pipe, call(1))
    assert [source.detail for source in program.needed_sources if source.kind == "image"] == [("image",)]
    assert verify(program, pipe, call(2), call(2)).error == 0.0


def test_a_constant_that_is_written_into_is_followed() -> None:
    class Pipeline:
        components: ClassVar[dict[str, Any]] = {}

        def __call__(self, generator: Any) -> dict[str, torch.Tensor]:
            buffer = torch.zeros(2, 4)
            noise = torch.randn(4, generator=generator)
            buffer[0] = noise
            buffer[1, 2:] += noise[:2]
            return {"sum": buffer.sum(0), "all": buffer * 2}

    program = capture(Pipeline(), {"generator": torch.Generator().manual_seed(0)})
    other = torch.arange(4.0)
    found = replay(program, {source.id: other for source in program.sources}, {})
    expected = torch.stack([other, torch.tensor([0.0, 0.0, 0.0, 1.0])])
    torch.testing.assert_close(found[("all",)], expected * 2)
    torch.testing.assert_close(found[("sum",)], expected.sum(0))


def test_no_weight_is_read(tmp_path: Path) -> None:
    for part in ("model_index.json", "scheduler", "tokenizer"):
        (tmp_path / part).symlink_to(SHAPES / part)
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text((SHAPES / part / "config.json").read_text())
    summary = capture_model(tmp_path, None, (), check=False)
    assert summary["verified"] is None
    unet = summary["components"]["unet"]
    assert unet["parameters"] > 11e6 and (unet["calls"], unet["part"]) == (3, "denoiser")
    assert [part["part"] for part in summary["components"].values()] == [
        "conditioning",
        "denoiser",
        "decoder",
        "decoder",
    ]
    json.dumps(summary)


def test_the_reference_model_is_captured_and_verified() -> None:
    summary = capture_model(SHAPES, None, ("num_inference_steps=4", "guidance_scale=3.0"), check=True)
    assert summary["verified"] == {"error": 0.0, "difference": None, "holds": True}
    assert summary["loop"]["phases"][0]["guidance"] == "u + 3 (c - u)" and summary["loop"]["steps"] == 4
    text = render(summary)
    assert "loop: 4 steps of one form" in text and "verified: another prompt and seed" in text


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"num_inference_step": 3}, "did you mean num_inference_steps"),
        ({"nonsense": 1}, "call.nonsense: StableDiffusionPipeline has no such argument"),
    ],
)
def test_an_argument_that_the_pipeline_does_not_take_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match="has no such argument") as caught:
        make_call(open_pipeline("stable_diffusion"), given)
    assert problem in str(caught.value)


def test_a_call_that_fails_is_told_with_the_pipelines_own_words() -> None:
    with pytest.raises(RecipeError, match="cannot be captured with these arguments") as caught:
        capture_model(SHAPES, None, ("height=63", "width=64"), check=False)
    assert "divisible by 8" in str(caught.value)


def test_a_pipeline_of_ones_own_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_pipelines.py").write_text(
        "from diffusers import StableDiffusionPipeline\n\n\nclass Mine(StableDiffusionPipeline):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    summary = capture_model(SHAPES, "my_pipelines:Mine", (), check=True)
    assert summary["pipeline"] == "Mine" and summary["verified"]["holds"]


@pytest.mark.parametrize("name", ["NoSuchPipeline", "no_such_module:Mine", "json:loads"])
def test_a_class_that_is_no_pipeline_is_refused(name: str) -> None:
    with pytest.raises(RecipeError):
        find_pipeline(name)


def test_code_that_comes_with_a_checkpoint_never_runs(tmp_path: Path) -> None:
    index = json.loads((SHAPES / "model_index.json").read_text()) | {"unet": ["my_unet", "MyUnet"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part in ("scheduler", "tokenizer", "text_encoder", "vae"):
        (tmp_path / part).symlink_to(SHAPES / part)
    (tmp_path / "my_unet.py").write_text("raise SystemExit('ran')")
    with pytest.raises(RecipeError, match="needs code that comes with the checkpoint"):
        open_without_weights(tmp_path)


def test_a_missing_component_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((SHAPES / "model_index.json").read_text())
    with pytest.raises(ArtifactError, match="can be made of it"):
        open_without_weights(tmp_path)


def test_modules_on_meta_give_the_shapes_of_real_ones() -> None:
    module = unet().eval()
    inputs = (torch.zeros(2, 4, 16, 16), torch.tensor(5), torch.zeros(2, 32, 32))
    with torch.no_grad():
        real = module(*inputs, return_dict=False)[0]
    found = run_for_shapes(module.to("meta"), inputs, {"return_dict": False})[0]
    assert found.device == META and found.shape == real.shape and found.dtype == real.dtype


def test_integers_are_computed_where_floats_are_shapes() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(4, 4, device="meta"))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            length = int(mask.sum())
            return (x @ self.weight)[mask][:length]

    mask = torch.tensor([True, False, True, True])
    assert run_for_shapes(Masked(), (torch.zeros(4, 4), mask), {}).shape == (3, 4)


def test_the_recorder_leaves_everything_as_it_was() -> None:
    pipe = open_pipeline("stable_diffusion")
    classes = type(pipe), type(pipe.tokenizer), torch.nn.Module.__call__
    with pytest.raises(ValueError, match="divisible by 8"):
        capture(pipe, call_of("stable_diffusion", ONE, 1) | {"height": 63})
    assert (type(pipe), type(pipe.tokenizer), torch.nn.Module.__call__) == classes
    assert "step" not in vars(pipe.scheduler)
    assert not Recorder(pipe).program({}).events


def test_no_name_of_a_pipeline_stands_in_the_code() -> None:
    import diffusers

    import slipcast_compiler.capture as room

    kinds = ("Pipeline", "Model", "Transformer2DModel", "AutoencoderKL")
    names = [name for name in dir(diffusers) if name.endswith(kinds)]
    for file in Path(room.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert not [name for name in names if len(name) > 12 and name in text], file
    events = _captured("flux").events
    assert {type(event) for event in events} == {Op, Call}
