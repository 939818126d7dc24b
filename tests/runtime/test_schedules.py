"""Schedules: legal for every name and sampler, told apart by name, and the numbers behind them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from slipcast.errors import RecipeError, RequestError
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import (
    BETA_SCHEDULES,
    SCHEDULES,
    NoiseProcess,
    beta_quantile,
    from_sigmas,
    from_timesteps,
    make_schedule,
)

LATENT = NoiseProcess(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
FLOW = NoiseProcess(prediction="flow", shift=3.0)
VP_NAMES = [name for name in SCHEDULES if not name.startswith("flow")]


@pytest.mark.parametrize(("name", "sampler"), [*itertools.product(VP_NAMES, SAMPLERS)])
@settings(deadline=None, max_examples=15)
@given(steps=st.integers(1, 50), beta=st.sampled_from(list(BETA_SCHEDULES)), zero=st.booleans())
def test_every_schedule_falls_to_its_terminal_sigma(name: str, sampler: str, steps: int, beta: str, zero: bool) -> None:
    process = NoiseProcess(beta_schedule=beta, rescale_betas_zero_snr=zero)
    schedule = make_schedule(process, name, steps, sampler)
    assert len(schedule.timesteps) == steps
    assert len(schedule.sigmas) == steps + 1
    assert all(type(v) is float for v in (*schedule.sigmas, *schedule.timesteps))
    assert np.all(np.diff(schedule.sigmas[:-1]) < 0)
    assert 0 <= schedule.sigmas[-1] <= schedule.sigmas[-2]
    assert np.all(np.diff(schedule.timesteps) <= 0)
    assert max(schedule.timesteps) <= 999
    assert min(schedule.timesteps) >= 0
    assert [schedule.timestep(s) for s in schedule.sigmas[:-1]] == list(schedule.timesteps)


@pytest.mark.parametrize("name", ["flow", "flow_uniform", "karras", "exponential", "beta"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_schedules(name: str, sampler: str, steps: int) -> None:
    schedule = make_schedule(FLOW, name, steps, sampler)
    assert schedule.sigmas[0] == pytest.approx(1.0)
    assert schedule.sigmas[-1] == 0.0
    np.testing.assert_allclose(schedule.timesteps, np.array(schedule.sigmas[:-1]) * 1000)
    assert schedule.timestep(0.25) == 250.0


def test_timesteps_between_those_of_the_grid_are_interpolated_in_log_sigma() -> None:
    schedule = make_schedule(LATENT, "trailing", 10, "heun")
    low, high = LATENT.sigmas[400], LATENT.sigmas[401]
    assert schedule.timestep(float(np.sqrt(low * high))) == pytest.approx(400.5, abs=1e-3)
    assert schedule.timestep(1e9) == 999.0
    assert schedule.timestep(0.0) == 0.0


def test_unknown_names_and_step_counts_are_refused_with_what_is_legal() -> None:
    with pytest.raises(RequestError, match="karras"):
        make_schedule(LATENT, "carras", 20)
    with pytest.raises(RequestError, match="dpmpp_2m"):
        make_schedule(LATENT, "karras", 20, "dpm")
    for steps in (0, -1, 1001, 2.0, True, "20"):
        with pytest.raises(RequestError, match="1 to 1000"):
            make_schedule(LATENT, "karras", steps)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="1 to 50"):
        make_schedule(LATENT, "lcm", 51, "lcm")
    with pytest.raises(RequestError, match="fewer steps"):
        make_schedule(LATENT, "linspace", 1000)
    with pytest.raises(RequestError, match="flow, flow_uniform"):
        make_schedule(FLOW, "linspace", 20, "euler")
    with pytest.raises(RequestError, match="leading, linspace"):
        make_schedule(LATENT, "flow", 20, "euler")
    with pytest.raises(RequestError, match="euler, heun"):
        make_schedule(FLOW, "flow", 20, "dpmpp_2m")


def test_configs_that_are_not_understood_are_refused() -> None:
    with pytest.raises(RecipeError, match="squaredcos_cap_v2"):
        NoiseProcess.from_scheduler_config({"beta_schedule": "laplace"})
    with pytest.raises(RecipeError, match="v_prediction"):
        NoiseProcess.from_scheduler_config({"prediction_type": "velocity"})
    with pytest.raises(RecipeError, match="trailing"):
        NoiseProcess.from_scheduler_config({"timestep_spacing": "even"})
    with pytest.raises(RecipeError, match="trained_betas"):
        NoiseProcess.from_scheduler_config({"trained_betas": [0.1, 0.2]})
    with pytest.raises(RecipeError, match="thresholding"):
        NoiseProcess.from_scheduler_config({"thresholding": True})


def test_configs() -> None:
    flow = NoiseProcess.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert (flow.prediction, flow.shift) == ("flow", 3.0)
    lcm = NoiseProcess.from_scheduler_config({"_class_name": "LCMScheduler"})
    assert (lcm.beta_schedule, lcm.beta_end, lcm.timestep_spacing) == ("scaled_linear", 0.012, None)
    pndm = {"_class_name": "PNDMScheduler", "trained_betas": None, "skip_prk_steps": True}
    assert NoiseProcess.from_scheduler_config(pndm) == NoiseProcess()
    trained = NoiseProcess.from_scheduler_config({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3})
    assert trained.sigmas[0] == pytest.approx(np.sqrt(0.1 / 0.9))
    assert trained.trained_betas == (0.1, 0.2, 0.3)


def test_the_reference_model() -> None:
    path = Path("recipes/models/shapes/scheduler/scheduler_config.json")
    if not path.exists():
        pytest.skip("no reference model here")
    process = NoiseProcess.from_scheduler_config(json.loads(path.read_text()))
    assert process == NoiseProcess(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    assert make_schedule(process, "leading", 20, "ddim").timesteps[:3] == (951.0, 901.0, 851.0)
    assert make_schedule(process, "leading", 20, "ddim").sigmas[-1] == process.sigmas[0]


def test_zero_terminal_snr() -> None:
    process = NoiseProcess(rescale_betas_zero_snr=True)
    assert process.sigmas[-1] == pytest.approx(4096, rel=1e-6)
    assert process.sigmas[0] == pytest.approx(NoiseProcess().sigmas[0], rel=1e-3)


def test_explicit_lists() -> None:
    schedule = from_timesteps(LATENT, [999, 500, 20])
    assert schedule.timesteps == (999.0, 500.0, 20.0)
    np.testing.assert_array_equal(schedule.sigmas, [*LATENT.sigmas[[999, 500, 20]], 0.0])
    again = from_sigmas(LATENT, schedule.sigmas)
    np.testing.assert_allclose(again.timesteps, schedule.timesteps, atol=1e-4)
    assert from_timesteps(LATENT, [999, 20], "deis").sigmas[-1] == LATENT.sigmas[0]
    for bad in ([], [1000], [-1], [5, 5], [5, 9], [[5]]):
        with pytest.raises(RequestError):
            from_timesteps(LATENT, bad)
    for bad in ([], [1.0], [1.0, 1.0], [1.0, 2.0], [1.0, -1.0], [float("nan"), 0.0]):
        with pytest.raises(RequestError):
            from_sigmas(LATENT, bad)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scipy's own, at tiny probabilities
@given(p=st.floats(0, 1), a=st.sampled_from([0.6, 0.3, 1.0, 2.5]), b=st.sampled_from([0.6, 0.9, 2.0]))
def test_beta_quantile_is_scipys(p: float, a: float, b: float) -> None:
    ours = beta_quantile(np.array([p]), a, b)[0]
    assert ours == pytest.approx(scipy.stats.beta.ppf(p, a, b), abs=1e-9)


def test_align_your_steps_interpolates_its_levels() -> None:
    ten, twenty = (make_schedule(LATENT, "ays_sd15", n, "euler").sigmas for n in (10, 20))
    np.testing.assert_allclose(twenty[:-1:2], ten[:-1], rtol=1e-12)
    np.testing.assert_allclose(twenty[1], np.sqrt(twenty[0] * twenty[2]), rtol=1e-12)
