"""Programs of tiny pipelines: replayed on other prompts and seeds they are the pipeline, and their loops roll."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from test_sizes import Mixing
from tiny import call_of, open_pipeline, unets
from tiny.parts import unet

from slipcast.errors import ArtifactError, RecipeError
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.find import find
from slipcast_compiler.capture.open import find_pipeline, open_with_weights, open_without_weights
from slipcast_compiler.capture.program import Call, Program
from slipcast_compiler.capture.record import Recorder, capture
from slipcast_compiler.capture.replay import replay
from slipcast_compiler.capture.roll import roll
from slipcast_compiler.capture.run import capture_model, render_all
from slipcast_compiler.capture.shapes import META, ShapeRunner, run_for_shapes
from slipcast_compiler.capture.summary import render, summarise

SHAPES = Path(__file__).parents[2] / "recipes" / "models" / "shapes"
ONE, OTHER = "a small red circle on white", "a large blue star on a black background"


def _captured(name: str) -> Program:
    return capture(open_pipeline(name), call_of(name, ONE, 1))


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
    program = _captured("stable_diffusion_img2img")
    assert [source.detail for source in program.needed_sources if source.kind == "image"] == [("image",)]


def test_a_step_without_guidance_says_what_it_ends_with() -> None:
    (phase,) = roll(_captured("flux")).phases  # type: ignore[union-attr]
    assert phase.guidance is None and phase.ending == "transformer"
    (phase,) = roll(_captured("lumina_2")).phases  # type: ignore[union-attr]
    assert phase.guidance is None and "pipeline_lumina2.py:" in phase.ending


def test_caches_that_a_module_fills_are_values() -> None:
    program = _captured("wan")  # whose decoder keeps features of the frames before
    written = [event.written for event in program.events if isinstance(event, Call) and event.written]
    assert written and all(path[0] in (0, 1) for each in written for path, _ in each)


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
    layers = unet["layers"]
    assert layers == {"heads": 160, "attention": 20, "neurons": 5376, "feed_forward": 10, "left_alone": {}}
    json.dumps(summary)


def test_the_reference_model_is_captured_and_verified() -> None:
    summary = capture_model(SHAPES, None, ("num_inference_steps=4", "guidance_scale=3.0"), check=True)
    assert summary["verified"] == {"error": 0.0, "difference": None, "holds": True}
    assert summary["loop"]["phases"][0]["guidance"] == "u + 3 (c - u)" and summary["loop"]["steps"] == 4
    text = render(summary)
    assert "loop: 4 steps of one form" in text and "verified: another prompt and seed" in text


def test_what_passes_leave_alone_is_said_with_the_reason() -> None:
    pipe = open_pipeline("wan")
    summary = summarise(capture(pipe, call_of("wan", "a small red circle", 1)), pipe)
    assert summary["components"]["text_encoder"]["layers"] is None  # passes are for the denoiser
    text = render(summary)
    assert "    0 heads in 0 attention layers, 64 neurons in 2 feed-forward layers" in text
    why = "its norm_q spans all heads, so that each depends on the others"
    assert f"    passes leave blocks.0.attn1 and 3 more alone: {why}" in text


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
    classes = type(pipe), type(pipe.tokenizer), torch.nn.Module.__call__, torch.Tensor.numpy, socket.socket.connect
    with pytest.raises(RecipeError, match="divisible by 8"):
        capture(pipe, call_of("stable_diffusion", ONE, 1) | {"height": 63})
    after = type(pipe), type(pipe.tokenizer), torch.nn.Module.__call__, torch.Tensor.numpy, socket.socket.connect
    assert after == classes
    assert "step" not in vars(pipe.scheduler)
    assert not Recorder(pipe, ShapeRunner()).program({}).events


def test_no_name_of_a_pipeline_or_model_stands_in_the_code() -> None:
    import diffusers

    import slipcast_compiler.capture as room

    models = {name for name in dir(diffusers.models) if name[0].isupper()}
    pipelines = {name for name in dir(diffusers) if name.endswith("Pipeline")}
    names = {name for name in models | pipelines if len(name) > 6}
    assert len(names) > 400
    for file in Path(room.__file__).parent.rglob("*.py"):
        assert not names.intersection(re.findall(r"\w+", file.read_text())), file


def test_what_a_bundle_of_it_would_be(tmp_path: Path) -> None:
    open_pipeline("flux").save_pretrained(tmp_path)
    size = ["height=32", "width=32", "max_sequence_length=16", "num_inference_steps=[2, 3]"]
    summary = capture_model(tmp_path, None, size, False)
    parts, arguments = summary["parts"], summary["arguments"]
    assert {name: part["uses"] for name, part in parts.items()} == {
        "conditioning": 1, "start": 1, "denoiser": 2, "update": 2, "decoder": 1,
    }  # fmt: skip
    assert parts["denoiser"]["reads"] == {"noise": 1, "prompt": 2} and parts["denoiser"]["constants"] == 1
    assert parts["denoiser"]["parameters"] == summary["components"]["transformer"]["parameters"] > 0
    assert arguments["texts"] == {"prompt": None} and arguments["listed"] == {"num_inference_steps": [2, 3]}
    assert arguments["fixed"]["height"] == 32 and arguments["gives"] == "image"
    text = render_all(summary)
    for line in (
        "parts, of which each becomes an engine",
        "runs 2 times: transformer, 0 operators",
        "reads 1 of noise, 2 of texts, 1 constants of the step",
        "free    seed, prompt (to be given)",
        "listed  num_inference_steps: 2, 3",
        "gives   image",
    ):
        assert line in text, text


def test_what_judges_finished_pictures_is_left_out(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=sizes, text_config=sizes, projection_dim=32))
    pipe = unets.stable_diffusion(safety_checker=checker, feature_extractor=CLIPImageProcessor())
    pipe.save_pretrained(tmp_path)
    for opened in (open_without_weights(tmp_path), open_with_weights(tmp_path)):
        assert opened.safety_checker is None and opened.config.requires_safety_checker is False
    assert find(open_without_weights(tmp_path), {"num_inference_steps": 2, "height": 32, "width": 32}).cut.parts


def test_what_can_be_no_bundle_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RecipeError("the length of a prompt decides what the pipeline does")

    open_pipeline("ddim").save_pretrained(tmp_path)
    monkeypatch.setattr("slipcast_compiler.capture.run.find_each", refuse)
    summary = capture_model(tmp_path, None, [], False)
    assert summary["loop"]["steps"] == 3 and not summary["parts"]
    assert "no bundle can be made of it: the length of a prompt" in render_all(summary)


class TwoNames(DiffusionPipeline):  # type: ignore[misc]
    """Its scheduler is there under two names, as in pipelines of two stages."""

    def __init__(self, denoiser: Mixing, scheduler: DDIMScheduler, prior_scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, prior_scheduler=prior_scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 2, generator: Any = None) -> dict[str, torch.Tensor]:
        x = torch.randn(1, 2, 8, 8, generator=generator)
        self.prior_scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            x = self.scheduler.step(self.denoiser(x), time, x).prev_sample
        return {"x": x}


def test_a_component_under_two_names_is_watched_once() -> None:
    scheduler = DDIMScheduler()
    pipe = TwoNames(Mixing(), scheduler, scheduler)
    assert find(pipe, {}).program.marks
    assert "step" not in vars(scheduler)
