"""Prediction types, guidance and starting noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from slipcast.sampling.denoiser import PREDICTIONS, Denoiser, final_scale, initial_scale, input_scale
from slipcast.sampling.guidance import Guidance, Guided, guide
from slipcast.sampling.samplers import sample
from slipcast.sampling.schedules import NoiseProcess, from_sigmas, make_schedule

RANDOM = np.random.default_rng(0)
COND, UNCOND = RANDOM.standard_normal((2, 3, 4, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@given(sigma=st.floats(1e-3, 1e3))
def test_a_perfect_model_gives_x0(prediction: str, sigma: float) -> None:
    x0, eps = COND.astype(np.float64), UNCOND.astype(np.float64)
    alpha = 1 / math.sqrt(1 + sigma**2)
    output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * alpha * x0, "sample": x0}[prediction]
    np.testing.assert_allclose(PREDICTIONS[prediction](x0 + sigma * eps, output, sigma), x0, atol=1e-9)


@given(t=st.floats(0.0, 1.0))
def test_a_perfect_flow_model_gives_x0(t: float) -> None:
    x0, eps = COND.astype(np.float64), UNCOND.astype(np.float64)
    np.testing.assert_allclose(PREDICTIONS["flow"]((1 - t) * x0 + t * eps, eps - x0, t), x0, atol=1e-12)
    sigma = min(t, 0.999) / (1 - min(t, 0.999))
    np.testing.assert_allclose(PREDICTIONS["flow_ratio"](x0 + sigma * eps, eps - x0, sigma), x0, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_denoiser_scales_tells_the_time_and_keeps_float32(prediction: str, library: str) -> None:
    process = NoiseProcess(prediction=prediction)
    sigmas = [0.75, 0.5, 0.0] if process.is_flow else [10.0, 1.0, 0.0]
    schedule, seen = from_sigmas(process, sigmas, "euler"), []

    def predict(x, timestep: float):
        seen.append((x, timestep))
        return 0.5 * x

    x = COND if library == "numpy" else torch.from_numpy(COND)
    d = Denoiser(process, schedule, predict)(x, schedule.sigmas[0])
    scale = {"flow": 1.0, "flow_ratio": 0.25}.get(prediction, 1 / math.sqrt(101))
    assert d.dtype == x.dtype
    assert d.shape == x.shape
    np.testing.assert_allclose(np.asarray(seen[0][0]), COND * np.float32(scale), rtol=1e-6)
    assert seen[0][1] == schedule.timesteps[0]
    assert type(seen[0][1]) is float


def test_guidance_of_scale_one_is_the_conditional_output() -> None:
    assert guide(COND, UNCOND, 1.0) is COND
    assert guide(COND, UNCOND, 1.0, rescale=0.7) is COND


@given(scale=st.floats(0, 20))
def test_rescale_of_zero_is_no_rescale(scale: float) -> None:
    np.testing.assert_array_equal(guide(COND, UNCOND, scale, 0.0), guide(COND, UNCOND, scale))
    if scale != 1.0:
        np.testing.assert_array_equal(guide(COND, UNCOND, scale), UNCOND + scale * (COND - UNCOND))


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_is_diffusers(rescale: float) -> None:
    guided = torch.from_numpy(UNCOND + 7.5 * (COND - UNCOND))
    theirs = rescale_noise_cfg(guided, torch.from_numpy(COND), rescale).numpy()
    ours = guide(COND, UNCOND, 7.5, rescale)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    tensors = guide(torch.from_numpy(COND), torch.from_numpy(UNCOND), 7.5, rescale)
    np.testing.assert_allclose(tensors.numpy(), theirs, rtol=1e-5, atol=1e-6)


def test_full_rescale_gives_each_sample_the_conditional_deviation() -> None:
    guided = guide(COND, UNCOND, 7.5, 1.0)
    np.testing.assert_allclose(guided.std(axis=(1, 2, 3)), COND.std(axis=(1, 2, 3)), rtol=1e-5)


class Recorder:
    """A model of two branches that depend on x and time, row by row; which of them were asked for is recorded."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, x, timestep: float, both: bool):
        self.asked.append(both)
        cond = 0.8 * x + timestep / 1e4
        return cond, 0.7 * x * x / (1 + x * x) if both else None


def draw(guidance: Guidance, x=COND, sampler: str = "dpmpp_2m"):
    """The end of 8 steps, and the branches that were asked for; plain guidance where it is a float."""
    process, model = NoiseProcess(), Recorder()
    schedule = make_schedule(process, "karras", 8, sampler)
    *_, end = sample(sampler, Guided(process, schedule, model, guidance), x * 10, schedule.sigmas)
    return end, model.asked, schedule


def plain(scale: float, rescale: float, sampler: str):
    process, model = NoiseProcess(), Recorder()
    schedule = make_schedule(process, "karras", 8, sampler)
    denoiser = Denoiser(process, schedule, lambda x, t: guide(*model(x, t, True), scale, rescale))
    return [*sample(sampler, denoiser, COND * 10, schedule.sigmas)][-1]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("settings", [{}, {"interval": (0.0, 1e9)}, {"reuse": 0}])
def test_guidance_everywhere_and_fresh_is_plain_guidance(settings, rescale: float, sampler: str) -> None:
    end, asked, _ = draw(Guidance(3.0, rescale, **settings), sampler=sampler)
    np.testing.assert_array_equal(end, plain(3.0, rescale, sampler))
    assert all(asked)


@pytest.mark.parametrize("settings", [{}, {"interval": (0.5, 5.0)}, {"reuse": 3}, {"rescale": 0.7}])
def test_scale_one_never_asks_for_the_unconditional_branch(settings) -> None:
    end, asked, _ = draw(Guidance(1.0, **settings))
    np.testing.assert_array_equal(end, plain(1.0, 0.0, "dpmpp_2m"))
    assert not any(asked)


def test_outside_the_interval_the_conditional_branch_is_alone() -> None:
    end, asked, schedule = draw(Guidance(3.0, interval=(0.5, 5.0)))
    assert asked == [0.5 <= sigma <= 5.0 for sigma in schedule.sigmas[:-1]]
    assert 0 < sum(asked) < 8
    assert not np.array_equal(end, plain(3.0, 0.0, "dpmpp_2m"))
    both_ends = (schedule.sigmas[4], schedule.sigmas[2])  # they belong to it
    assert draw(Guidance(3.0, interval=both_ends))[1] == [False, False, True, True, True, False, False, False]


def test_the_last_gap_is_added_to_the_conditional_branch() -> None:
    process, schedule = NoiseProcess(), make_schedule(NoiseProcess(), "karras", 8)
    guided = Guided(process, schedule, model := Recorder(), Guidance(3.0, reuse=2))
    outputs = [guided(COND * sigma, sigma) for sigma in schedule.sigmas[:5]]
    assert model.asked == [True, False, False, True, False]
    for i, fresh in enumerate((0, 0, 0, 3, 3)):
        sigma, at = schedule.sigmas[i], schedule.sigmas[fresh]
        then = model(COND * at / math.hypot(1, at), schedule.timesteps[fresh], True)
        now = model(COND * sigma / math.hypot(1, sigma), schedule.timesteps[i], True)[0]
        expected = COND * sigma - sigma * (now + 2.0 * (then[0] - then[1]))
        np.testing.assert_allclose(outputs[i], expected, rtol=1e-4, atol=1e-4)


def test_the_gap_of_one_run_is_not_that_of_the_next() -> None:
    settings = Guidance(3.0, 0.5, (0.2, 8.0), 2)
    end, asked, _ = draw(settings)
    again, asked_again, _ = draw(settings)
    assert asked == asked_again
    np.testing.assert_array_equal(end, again)
    tensors, *_ = draw(settings, torch.from_numpy(COND))
    np.testing.assert_allclose(tensors.numpy(), end, rtol=1e-4, atol=1e-5)
    for i in range(len(COND)):  # and rows do not see each other
        np.testing.assert_array_equal(draw(settings, COND[i : i + 1])[0][0], end[i])


def test_starting_noise() -> None:
    process = NoiseProcess()
    assert initial_scale(process, 3.0, "dpmpp_2m") == pytest.approx(math.sqrt(10))
    assert initial_scale(process, 3.0, "euler") == 3.0  # linspace is the default of Euler's family
    leading = make_schedule(process, "leading", 10, "euler")
    assert initial_scale(process, leading, "euler") == pytest.approx(math.hypot(1, leading.sigmas[0]))
    trailing = make_schedule(process, "trailing", 10, "euler")
    assert initial_scale(process, trailing, "euler") == trailing.sigmas[0]
    assert initial_scale(NoiseProcess(prediction="flow"), 1.0, "euler") == 1.0


def test_final_scale_is_one_where_no_noise_is_left() -> None:
    process = NoiseProcess()
    assert final_scale(process, make_schedule(process, "leading", 10, "ddim")) == 1.0
    deis = make_schedule(process, "linspace", 10, "deis")
    assert final_scale(process, deis) == input_scale("epsilon", deis.sigmas[-1]) < 1.0


def test_the_process_survives_json() -> None:
    process = NoiseProcess(trained_betas=(0.1, 0.2), num_train_timesteps=2)
    adapter = TypeAdapter(NoiseProcess)
    assert adapter.validate_json(adapter.dump_json(process)) == process
    assert hash(process) == hash(NoiseProcess(trained_betas=(0.1, 0.2), num_train_timesteps=2))
