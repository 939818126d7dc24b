"""Slipcast's samplers in the place of a pipeline's scheduler: which, and what a run may choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bundling import bundle_of, distance, make_bundle
from tiny import call_of, open_pipeline

import slipcast
from slipcast.errors import RecipeError, RequestError
from slipcast_compiler.capture.driving import LIMIT, check_form, compare, drive, drive_again
from slipcast_compiler.capture.find import Found, find_for
from slipcast_compiler.capture.program import Program, leaves
from slipcast_compiler.capture.record import capture, find_scheduler
from slipcast_compiler.capture.resampling import resample
from slipcast_compiler.engines.recording import Recording
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.recipe.sampling import SamplingTable
from slipcast_compiler.recipe.targets import TargetTable

STEPS = 3
# pipeline -> sampler, schedule, and what the numbers are that differ from step to step
DRIVEN = {
    "stable_diffusion": ("ddim", "leading", {"timestep", "guidance"}),
    "stable_diffusion_xl": ("euler", "linspace", {"inverse_scale", "timestep", "guidance"}),
    "pixart_alpha": ("dpmpp_2m", "linspace", {"timestep", "guidance"}),
    "stable_diffusion_3": ("euler", "flow", {"timestep", "guidance"}),
    "flux": ("euler", "flow_uniform", {"timestep", "guidance"}),
    "sana": ("dpmpp_2m", "flow_even", {"timestep", "guidance"}),  # solvers on noise over signal
    "wan": ("unipc", "flow_even", {"timestep", "guidance"}),
    "ddpm": ("ddpm", "leading", {"timestep"}),
    "latent_consistency": ("lcm", "lcm", {"timestep"}),  # its guidance is an embedding, of as many numbers
}


def captured(name: str, **given: Any) -> tuple[Any, Program]:
    pipe = open_pipeline(name)
    generator = torch.Generator("cpu").manual_seed(0)
    with quiet():
        return pipe, capture(pipe, {**call_of(name, "a star", 1), "generator": generator, **given})


def found(name: str) -> Found:
    with quiet():
        return find_for(open_pipeline(name), [lambda prompt: call_of(name, prompt, 1)])[0]


SLOW = ("wan", "pixart_alpha")


@pytest.mark.parametrize("name", [pytest.param(e, marks=pytest.mark.slow) if e in SLOW else e for e in DRIVEN])
def test_the_sampler_is_the_schedulers(name: str) -> None:
    sampler, schedule, quantities = DRIVEN[name]
    loop = found(name).loop
    assert loop is not None
    assert (loop.sampling.sampler, loop.sampling.schedule, loop.sampling.steps) == (sampler, schedule, STEPS)
    assert {column.of for column in loop.columns["denoiser"]} == quantities
    assert loop.steps == "num_inference_steps"
    assert loop.guidance == ("guidance_scale" if "guidance" in quantities else None)


def test_another_sampler_or_schedule_is_told_from_it() -> None:
    """The comparison can fail: of what differs in a single number."""
    pipe, program = captured("stable_diffusion_xl")
    driven = drive(program, find_scheduler(pipe), STEPS)
    assert compare(program, driven.sampling)[1] <= LIMIT
    for change in ({"schedule": "trailing"}, {"sampler": "dpmpp_2m"}, {"sampler": "heun"}, {"sampler": "ddim"}):
        assert compare(program, driven.sampling.model_copy(update=change))[1] > 10 * LIMIT, change
    noise = driven.sampling.noise
    other = replace(noise, beta_end=noise.beta_end * 1.01)
    assert compare(program, driven.sampling.model_copy(update={"noise": other}))[1] > LIMIT


def test_a_sampler_that_draws_more_noise_is_told_from_it() -> None:
    """Or lays more steps than it can; and of several schedulers none is known to be the one."""
    pipe, program = captured("stable_diffusion_xl")
    with pytest.raises(RecipeError, match="several schedulers"):
        drive(program, None, STEPS)
    driven = drive(program, find_scheduler(pipe), STEPS)
    with pytest.raises(ValueError, match="draws more noise"):
        compare(program, driven.sampling.model_copy(update={"sampler": "euler_ancestral"}))
    with pytest.raises(RecipeError, match="follow no schedule"):
        drive_again(program, driven, 2000)


def test_a_shift_that_the_pipeline_computes_is_found() -> None:
    pipe, program = captured("flux")
    driven = drive(program, find_scheduler(pipe), STEPS)
    assert driven.sampling.noise.shift == pytest.approx(np.exp(0.4675), abs=0.2)
    assert driven.sampling.noise.shift != 1
    _, other = captured("flux", num_inference_steps=7)
    assert drive_again(other, driven, 7).evaluations[0].timestep == pytest.approx(1000)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("stable_diffusion_3_inpaint", "its latents are changed between two steps"),
        ("sana_sprint", "slipcast has no sampler in the place of"),
        ("stable_audio_edm", "slipcast has no sampler in the place of"),
    ],
)
def test_why_a_run_cannot_choose(name: str, why: str) -> None:
    pipe, program = captured(name)
    with pytest.raises(RecipeError, match=why):
        drive(program, find_scheduler(pipe), STEPS)
    if "latents" in why:
        with pytest.raises(RecipeError, match=why):
            check_form(program)


def test_what_a_recipe_asks_for() -> None:
    pipe, program = captured("stable_diffusion_xl")
    own = drive(program, find_scheduler(pipe), STEPS).sampling
    made = resample(own, find_scheduler(pipe), SamplingTable(sampler="dpmpp_2m", schedule="karras", steps=9))
    assert (made.sampler, made.schedule, made.steps) == ("dpmpp_2m", "karras", 9)
    assert made.noise.beta_end == own.noise.beta_end
    pipe, program = captured("flux")
    flow = drive(program, find_scheduler(pipe), STEPS).sampling
    solver = resample(flow, find_scheduler(pipe), SamplingTable(sampler="dpmpp_2m", steps=4))
    assert (solver.noise.prediction, solver.schedule, solver.noise.shift) == (
        "flow_ratio",
        "flow_uniform",
        flow.noise.shift,
    )
    np.testing.assert_allclose(solver.lay().timesteps, flow.lay(4).timesteps)
    pipe, program = captured("stable_diffusion_xl")
    listed = resample(own, find_scheduler(pipe), SamplingTable(timesteps=(900.0, 500.0, 100.0)))
    assert (listed.steps, listed.schedule, listed.timesteps) == (3, None, (900.0, 500.0, 100.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion_xl", "flux"])
def test_a_run_chooses_steps_and_guidance(name: str, tmp_path: Any) -> None:
    """It draws what the pipeline draws, with numbers that were not captured."""
    pipe = open_pipeline(name)
    with slipcast.load(make_bundle(pipe, name, tmp_path)) as loaded:
        seen: list[int] = []
        for chosen in ({}, {"num_inference_steps": 6}, {"guidance_scale": 2.25}):
            call = call_of(name, "a large star", 3) | chosen | {"generator": torch.Generator("cpu").manual_seed(3)}
            made = loaded(
                "a large star", seed=3, output_type="np", **chosen,
                callback_on_step_end=lambda _, step, steps: seen.append(step),
            )  # fmt: skip
            with torch.no_grad():
                result = pipe(**call)
            wanted = next(each for _, each in leaves(dict(result.items())))
            assert distance(np.asarray(made.images[0]), wanted.float().numpy())["psnr"] > 100, chosen
            assert made.steps == (chosen.get("num_inference_steps", STEPS),)
        assert seen == [*range(STEPS), *range(6), *range(STEPS)]
        two = loaded(["a large star", "a circle"], seed=[3, 4], output_type="np")
        alone = loaded("a circle", seed=4, output_type="np")
        np.testing.assert_array_equal(two.images[1], alone.images[0])
        for wrong in ({"num_inference_steps": 0}, {"num_inference_steps": 2.5}, {"guidance_scale": 1.0}):
            with pytest.raises(RequestError, match=next(iter(wrong))):
                loaded("a star", **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion_xl", "sana"])
def test_a_run_chooses_at_each_of_several_sizes(name: str, tmp_path: Any) -> None:
    """A model may be told the size, which is the same at all steps: a row of the table for each size."""
    pipe, heights = open_pipeline(name), (32, 64)

    def called(height: int, prompt: str, seed: int = 1, **chosen: Any) -> dict[str, Any]:
        return call_of(name, prompt, seed) | {"height": height} | chosen

    calls = [lambda prompt, height=height: called(height, prompt) for height in heights]
    with slipcast.load(bundle_of(pipe, name, calls, tmp_path)) as loaded:
        rows = [call.row for each in loaded.program.every for call in each.every_call if call.row is not None]
        assert len(set(rows)) == (2 if name == "stable_diffusion_xl" else 0)
        for height in heights:
            chosen = {"num_inference_steps": 5, "guidance_scale": 2.25}
            made = loaded("a large star", seed=3, output_type="np", height=height, **chosen)
            with torch.no_grad():
                wanted = pipe(**called(height, "a large star", 3, **chosen))["images"]
            assert distance(made.images[0], np.asarray(wanted))["psnr"] > 100


@pytest.mark.slow
def test_what_steps_alone_decide_is_exact_in_half_precision(tmp_path: Any) -> None:
    """bf16 has 8 bits, and a timestep 10: its embedding would be another's."""
    tables = (TargetTable(engine="onnxruntime"), TargetTable(engine="openvino", precision="bf16"))
    bundle = make_bundle(open_pipeline("stable_diffusion_xl"), "stable_diffusion_xl", tmp_path, *tables)
    found = {}
    for engine in ("onnxruntime", "openvino"):
        recording = Recording(["denoiser_step"])
        with slipcast.load(bundle, target=engine, instrument=recording) as loaded:
            assert loaded.program.exact == {"denoiser_step"}
            loaded("a star", seed=1, output_type="np")
        found[engine] = recording.evaluations("denoiser_step")
    assert len(found["openvino"]) == STEPS
    for exact, rounded in zip(*found.values(), strict=True):
        for name, array in exact.items():
            assert np.abs(rounded[name] - array).max() <= 1e-4 * np.abs(array).max(), name
