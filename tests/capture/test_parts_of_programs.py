"""Programs in parts: what each holds, that they give what the pipeline gives, and what cannot be cut."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ftfy
import numpy as np
import pytest
import torch
from bundling import bundle_of
from diffusers import DDIMScheduler
from test_refusals import Denoiser, Plain
from tiny import call_of, open_pipeline
from torch import nn

import slipcast
from slipcast.errors import RecipeError
from slipcast.run.texts import clean_text
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.cut import Cut, cut
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.processing import call_pipeline
from slipcast_compiler.capture.program import Program, Ref, Source, Tokenized, leaves
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.texts import AWKWARD, find_templates
from slipcast_compiler.capture.verify import verify
from slipcast_compiler.export.program import check_program, export_program
from slipcast_compiler.export.replayed import Replayed

ONE, OTHER = "a small red circle on white", "a large blue star on a black background"


def run(parts: Cut, program: Program, pipe: Any) -> list[torch.Tensor]:
    """The results by the parts, each of which is run as its module."""
    components = {name: each for name, each in pipe.components.items() if isinstance(each, nn.Module)}
    values = {source.id: source.value for source in program.needed_sources}
    by_name = {part.name: part for part in parts.parts}
    for use in parts.uses:
        part = by_name[use.part]
        given = [values[value] for value in use.inputs]
        known = {name: (tuple(each.shape), each.dtype) for name, each in zip(part.inputs, given, strict=True)}
        module = Replayed(part, components, known)
        with torch.no_grad():
            outputs = module(*given, *(rows[use.row] for _, rows in part.table))
        values |= dict(zip(use.outputs, outputs, strict=True))
    return [values[value.id] for _, value in program.results if isinstance(value, Ref)]


@pytest.mark.parametrize("name", ["flux", "stable_diffusion_3_inpaint", "flux_2_klein"])
def test_the_parts_are_the_pipeline(name: str) -> None:
    pipe = open_pipeline(name)
    program = capture(pipe, call_of(name, ONE, 1))
    (found,) = run(cut(program), program, pipe)
    with torch.no_grad():
        result = call_pipeline(pipe, call_of(name, ONE, 1))
    torch.testing.assert_close(found, next(tensor for _, tensor in leaves(dict(result.items()))), rtol=0, atol=1e-6)


def test_what_depends_on_the_prompt_alone_leaves_the_loop_and_steps_share_a_part() -> None:
    program = capture(open_pipeline("stable_diffusion"), call_of("stable_diffusion", ONE, 1))
    found = cut(program)
    assert [use.part for use in found.uses] == [
        "conditioning", "start", *["denoiser", "update"] * 3, "decoder",
    ]  # fmt: skip
    assert [use.row for use in found.uses if use.part == "denoiser"] == [0, 1, 2]
    assert [found.uses[place].part for place in found.steps] == ["update"] * 3
    parts = {part.name: part for part in found.parts}
    bound = program.binding
    assert all("noise" not in bound[value] for value in parts["conditioning"].outputs)
    (timesteps,) = (rows for _, rows in parts["denoiser"].table)
    assert timesteps.shape == (3,) and len(timesteps.unique()) == 3


def test_two_denoisers_are_two_parts() -> None:
    program = capture(open_pipeline("wan_2_2"), call_of("wan_2_2", ONE, 1))
    used = [use.part for use in cut(program).uses if use.part.startswith("denoiser")]
    assert used == ["denoiser"] * 2 + ["denoiser_2"] * 4


class Writing(Plain):
    """Writes into the latent that it began with."""

    def __call__(self, num_inference_steps: int = 5, generator: Any = None) -> dict[str, torch.Tensor]:
        x = first = torch.randn(3, 2, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            x = self.scheduler.step(self.denoiser(x), time, x).prev_sample
            self.write(first)
            x = x + first
        return {"x": x}

    def write(self, first: torch.Tensor) -> None:
        first.diagonal().mul_(0.5)


def test_a_write_into_what_another_part_holds_is_refused_with_its_line() -> None:
    """Where it goes through a view that has no way back."""
    pipe = Writing(Denoiser(), DDIMScheduler())
    program = capture(pipe, make_call(pipe, {}))
    with pytest.raises(RecipeError, match="writes into a tensor that another part") as refused:
        cut(program)
    assert "aten::mul_ at " in str(refused.value.got) and "test_parts_of_programs.py:" in str(refused.value.got)


class OtherDraws(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output + torch.randn(3, 2, generator=torch.Generator("cpu").manual_seed(step))


class UniformDraws(Plain):
    def __call__(self, num_inference_steps: int = 5, generator: Any = None) -> dict[str, torch.Tensor]:
        return {"x": self.denoiser(torch.rand(3, 2, generator=generator))}


class TwoLatents(Plain):
    """Steps a second latent by a copy of its scheduler, whose class it asks for."""

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 5, generator: Any = None) -> dict[str, torch.Tensor]:
        x, y = torch.randn(3, 2, generator=generator), torch.randn(3, 2, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        other = copy.deepcopy(self.scheduler)
        assert type(self.scheduler) is type(other) is DDIMScheduler
        for time in self.scheduler.timesteps:
            both = self.denoiser(x + y)
            y = other.step(both.cos(), time, y).prev_sample
            x = self.scheduler.step(both, time, x, eta=0.0).prev_sample
        return {"x": x, "y": y}


def test_a_copy_of_the_scheduler_steps_by_itself() -> None:
    pipe = TwoLatents(Denoiser(), DDIMScheduler())
    program = capture(pipe, make_call(pipe, {}))
    assert len(program.marks) == 3
    assert verify(program, pipe, make_call(pipe, {}, seed=3), make_call(pipe, {}, seed=3)).error == 0
    assert "step" not in vars(pipe.scheduler)


class DrawsBesides(Plain):
    """Draws by the call's generator, and by torch's own."""

    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output + torch.randn(3, 2)


class DrawsByTorchsOwn(Plain):
    """Is given no generator."""

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 5) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return super().__call__(num_inference_steps) | {"y": torch.randn(2, 2)}


@pytest.mark.parametrize("kind", [DrawsBesides, DrawsByTorchsOwn])
def test_draws_by_torchs_own_generator_are_those_of_the_seed(kind: Any, tmp_path: Path) -> None:
    pipe = kind(Denoiser(), DDIMScheduler())
    bundle = bundle_of(pipe, "draws", [lambda _: make_call(pipe, {})], tmp_path)
    with slipcast.load(bundle) as loaded:
        found = loaded(seed=3).images
    torch.manual_seed(3)
    wanted = pipe(**make_call(pipe, {}, seed=3)).values()
    for each, tensor in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each, tensor, atol=1e-5)


@pytest.mark.parametrize(("kind", "got"), [(OtherDraws, "another generator"), (UniformDraws, "rand.generator")])
def test_a_draw_that_a_runtime_cannot_repeat_is_refused(kind: Any, got: str, tmp_path: Any) -> None:
    pipe = kind(Denoiser(), DDIMScheduler())
    program = capture(pipe, make_call(pipe, {}))
    found = [Found(program, cut(program), {}, {}, ())]
    with pytest.raises(RecipeError, match="a draw cannot be had in a runtime") as refused:
        export_program(found, pipe, tmp_path, lambda done, total: None)
    assert got in str(refused.value.got)
    with pytest.raises(RecipeError, match="a draw cannot be had in a runtime"):  # in the plan
        check_program(found, pipe)


# --- texts ----------------------------------------------------------------------------------------------------------


def _program(*texts: str) -> Any:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    sources = [
        Source(at, "prompt", ("tokenizer", "input_ids"), tokens, Tokenized((text,), True, None, None))
        for at, text in enumerate(texts)
    ]
    return SimpleNamespace(pipeline="Ours", needed_sources=tuple(sources))


CALLS = {"prompt": ONE, "negative_prompt": "white"}, {"prompt": AWKWARD, "negative_prompt": "white"}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.strip(),
        lambda text: text.lower(),
        lambda text: f"<|user|>{text.strip().lower()}<|end|>",
        lambda text: f"describe: {text}",
        lambda text: f"describe: {clean_text(text)}",
        lambda text: clean_text(ftfy.fix_text(text)),
        ftfy.fix_text,
    ],
)
def test_how_a_prompt_is_changed_is_found(change: Any) -> None:
    templates = find_templates((_program(change(ONE), "white"), _program(change(AWKWARD), "white")), CALLS)
    texts = {"prompt": " Something ELSE, a cat\u2019s &amp; ", "negative_prompt": "black"}
    assert (templates[0](texts), templates[1](texts)) == (change(texts["prompt"]), "black")


def test_a_text_that_is_always_the_same_is_constant() -> None:
    templates = find_templates((_program(""), _program("")), CALLS)
    assert templates[0].argument is None and templates[0]({}) == ""


@pytest.mark.parametrize("change", [lambda text: text[::-1], lambda text: " ".join(text.split()), str.title])
def test_a_prompt_that_is_changed_otherwise_is_refused(change: Any) -> None:
    with pytest.raises(RecipeError, match="what its tokenizer is given cannot be made in a runtime"):
        find_templates((_program(change(ONE)), _program(change(AWKWARD))), CALLS)
