"""The same model, noise and timesteps give the same trajectory as diffusers' schedulers.

`python tests/runtime/test_diffusers_parity.py` prints the largest relative difference of each sampler and schedule.

What cannot match, and why:

- `linspace` with DDIM and PNDM: diffusers steps from t to t - T // n, not to the next timestep of its own list, so its
  steps overlap or leave gaps there (and with `trailing` where n does not divide T). Ours step to the next timestep.
- PNDM with v prediction: diffusers extrapolates the raw v of earlier timesteps; ours extrapolates eps, as the paper.
- `dpmpp_3m_sde`: the third-order SDE update of diffusers 0.42 has a wrong sign (see `samplers.dpmpp_3m_sde`). It is
  compared with that one term put right, which shows that nothing else differs.
- DEIS in one step of karras, exponential or beta sigmas: diffusers steps from the first sigma to itself.
- DPMSolverSDEScheduler draws from a Brownian tree, which no sequence of independent draws reproduces: it is compared on
  the same Brownian path, built from the same draws.
- Cosine betas reach sigma = 20,000, where diffusers' Heun, KDPM2 and DEIS lose digits in float32 with v prediction
  (differences of large numbers): the test shows that ours is the nearer one to a float64 run.
- `lcm`: the boundary scalings, below 1e-5 on LCM's timesteps, are left out.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from slipcast.sampling.denoiser import Denoiser, final_scale, initial_scale
from slipcast.sampling.samplers import SAMPLERS, sample
from slipcast.sampling.schedules import (
    BETA_SCHEDULES,
    NoiseProcess,
    Schedule,
    from_sigmas,
    from_timesteps,
    make_schedule,
)

# diffusers with numpy 2; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
STEPS, TOLERANCE, SHAPE = 20, 1e-4, (2, 4, 6, 6)
# In float32, of v_prediction at a cosine's levels; the last one on some CPUs.
LOSING = ("heun", "dpm2", "deis", "dpmpp_sde")
SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = ("karras", "exponential", "beta")
ALL = SPACINGS + SIGMAS


class Ours3M(diffusers.DPMSolverMultistepScheduler):
    """With the sign of the last term of the third-order SDE update put right."""

    def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample=None, noise=None, **kwargs):
        x = super().multistep_dpm_solver_third_order_update(
            model_output_list, *args, sample=sample, noise=noise, **kwargs
        )
        i = self.step_index
        t, s0, s1, s2 = (math.log(self.sigmas[j]) for j in (i + 1, i, i - 1, i - 2))
        m0, m1, m2 = model_output_list[-1], model_output_list[-2], model_output_list[-3]
        r0, r1 = (s1 - s0) / (s0 - t), (s2 - s1) / (s0 - t)
        d2 = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
        return x + d2 / math.sqrt(1 + math.exp(2 * t))


@dataclass(frozen=True)
class Case:
    """A diffusers scheduler, its arguments, the schedules it can lay, and which of its calls end a step."""

    scheduler: type
    schedules: tuple[str, ...] = ALL
    kwargs: dict[str, Any] = field(default_factory=dict)
    step_kwargs: dict[str, Any] = field(default_factory=dict)
    calls: str = "one"  # one, two (a step has two, the last one), pseudo (the first has two)
    noise: bool = False
    zero_snr: bool = False
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")


MULTI = {"algorithm_type": "sde-dpmsolver++"}
DIVIDING = ("leading", "trailing")
CASES: dict[str, Case] = {
    "ddpm": Case(diffusers.DDPMScheduler, SPACINGS, {"clip_sample": False}, noise=True, zero_snr=True),
    "ddim": Case(diffusers.DDIMScheduler, DIVIDING, {"clip_sample": False}, zero_snr=True),
    "ddim eta": Case(
        diffusers.DDIMScheduler, DIVIDING, {"clip_sample": False}, {"eta": 0.6}, noise=True, zero_snr=True
    ),
    "pndm": Case(diffusers.PNDMScheduler, DIVIDING, {"skip_prk_steps": True}, calls="pseudo", predictions=("epsilon",)),
    "euler": Case(diffusers.EulerDiscreteScheduler, zero_snr=True),
    "euler_ancestral": Case(diffusers.EulerAncestralDiscreteScheduler, SPACINGS, noise=True, zero_snr=True),
    "heun": Case(diffusers.HeunDiscreteScheduler, calls="two"),
    "dpm2": Case(diffusers.KDPM2DiscreteScheduler, calls="two"),
    "dpmpp_2m": Case(diffusers.DPMSolverMultistepScheduler, zero_snr=True),
    "dpmpp_2m_sde": Case(diffusers.DPMSolverMultistepScheduler, kwargs=MULTI, noise=True, zero_snr=True),
    "dpmpp_3m_sde": Case(Ours3M, kwargs={**MULTI, "solver_order": 3}, noise=True, zero_snr=True),
    "dpmpp_sde": Case(diffusers.DPMSolverSDEScheduler, calls="two", noise=True),
    "unipc": Case(diffusers.UniPCMultistepScheduler, zero_snr=True),
    "deis": Case(diffusers.DEISMultistepScheduler),
    "lcm": Case(diffusers.LCMScheduler, ("lcm",), noise=True, zero_snr=True),
}
PROCESSES: dict[str, dict[str, Any]] = {
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.linspace(0.0005, 0.015, 1000).tolist()},
    "sigmoid": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "sigmoid"},
    "zero_snr": {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True,
    },
}  # fmt: skip


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    """Smooth, nonlinear, of the size of noise."""
    mix = torch.tensor([[0.6, -0.4, 0.2, 0.1], [0.3, 0.7, -0.2, 0.2], [-0.1, 0.2, 0.8, 0.3], [0.2, -0.3, 0.1, 0.6]])
    phase = torch.sin(torch.arange(4.0) + 3.0 * float(t) / 1000)[:, None, None]
    return 0.6 * x + 0.8 * torch.tanh(torch.einsum("dc,bchw->bdhw", mix.to(x.dtype), x) + 0.5 * phase)


def build(name: str, schedule: str, process: str, prediction: str, **extra: Any) -> tuple[Any, NoiseProcess]:
    """diffusers' scheduler, and what our reader makes of the config it writes."""
    case = CASES[name]
    kwargs = {**PROCESSES[process], **case.kwargs, "prediction_type": prediction, **extra}
    if schedule in SPACINGS:
        kwargs["timestep_spacing"] = schedule
    elif schedule in SIGMAS:
        kwargs[f"use_{schedule}_sigmas"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = case.scheduler(**kwargs)
    return scheduler, NoiseProcess.from_scheduler_config({"_class_name": case.scheduler.__name__, **scheduler.config})


class SharedPath:
    """Stands in for DPMSolverSDEScheduler's Brownian tree: increments of one path over [s, middle], then [s, t]."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.first = generator, None

    def __call__(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        draw = torch.randn(SHAPE, generator=self.generator)
        if self.first is None:
            self.first, self.middle = draw, t
            return draw
        first, self.first = self.first, None
        return (((s - self.middle).sqrt() * first + (self.middle - t).sqrt() * draw) / (s - t).sqrt()).float()


def run_diffusers(scheduler: Any, case: Case, steps: int, **set_kwargs: Any) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(11)
    scheduler.set_timesteps(**(set_kwargs or {"num_inference_steps": steps}))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # or it starts at the second of two equal timesteps and runs off its table
    if isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        scheduler.noise_sampler = SharedPath(generator)
    kwargs = dict(case.step_kwargs)
    if case.noise and not isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        kwargs["generator"] = generator
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)) * scheduler.init_noise_sigma
    trajectory = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(scaled, float(t)), t, x, **kwargs).prev_sample
        trajectory.append(x.numpy())
    if case.calls == "two":
        return [*trajectory[1:-1:2], trajectory[-1]]
    return trajectory[1:] if case.calls == "pseudo" and steps > 1 else trajectory


def run_ours(
    name: str, process: NoiseProcess, schedule: Schedule, eta: float = 0.0, dtype: type = np.float32
) -> list[np.ndarray]:
    """Our trajectory in the coordinates of diffusers' scheduler."""
    generator, sampler = torch.Generator().manual_seed(11), name.split()[0]
    denoise = Denoiser(process, schedule, lambda x, t: model(torch.from_numpy(x), t).numpy())
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)).numpy().astype(dtype)
    x = x * initial_scale(process, schedule, sampler)
    vp = SAMPLERS[sampler].grid.start == "vp"
    trajectory = []
    steps = sample(sampler, denoise, x, schedule.sigmas, lambda: torch.randn(SHAPE, generator=generator).numpy(), eta)
    for x, sigma in zip(steps, schedule.sigmas[1:], strict=True):
        assert x.dtype == dtype
        trajectory.append(x / math.sqrt(1 + sigma**2) if vp else x)
    if vp:
        np.testing.assert_allclose(x * final_scale(process, schedule), trajectory[-1], rtol=1e-6)
    return trajectory


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    assert len(ours) == len(theirs)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, theirs, strict=True))


def measure(name: str, schedule: str, process: str, prediction: str, steps: int = STEPS, **extra: Any) -> float:
    scheduler, noise = build(name, schedule, process, prediction, **extra)
    theirs = run_diffusers(scheduler, CASES[name], steps)
    laid = make_schedule(noise, schedule, steps, name.split()[0])
    check_grid(scheduler, name, laid, steps)
    return difference(run_ours(name, noise, laid, CASES[name].step_kwargs.get("eta", 0.0)), theirs)


def check_grid(scheduler: Any, name: str, laid: Schedule, steps: int) -> None:
    """Timesteps and sigmas, where diffusers keeps them."""
    case, asked = CASES[name], scheduler.timesteps.double().numpy()
    if case.calls == "two":
        inner = asked[1::2]
        asked = asked[::2]
        if name != "heun":
            middles = [laid.timestep(math.sqrt(s * t)) for s, t in zip(laid.sigmas, laid.sigmas[1:-1], strict=False)]
            np.testing.assert_allclose(inner, middles, atol=2e-3)
    elif case.calls == "pseudo" and steps > 1:
        asked = np.delete(asked, 1)
    np.testing.assert_allclose(laid.timesteps, asked, atol=2e-3)
    if not hasattr(scheduler, "sigmas"):
        return
    sigmas = scheduler.sigmas.double().numpy()
    if case.calls == "two":  # s0, s1, s1, s2, s2, ...
        sigmas = np.array([sigmas[0], *sigmas[1 : 2 * steps - 2 : 2], 0.0])
    np.testing.assert_allclose(laid.sigmas, sigmas, rtol=2e-6, atol=1e-7)


def configurations(name: str) -> list[tuple[str, str, str]]:
    case = CASES[name]
    found = []
    for process in PROCESSES:
        if (process == "sigmoid" and name != "ddpm") or (process == "zero_snr" and not case.zero_snr):
            continue
        for prediction in case.predictions:
            if not (process == "zero_snr" and prediction == "epsilon"):  # no signal to predict noise from
                found += [(schedule, process, prediction) for schedule in case.schedules]
    return found


def loses_digits(name: str, process: str, prediction: str) -> bool:
    return name in LOSING and process == "cosine" and prediction == "v_prediction"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "dpm2" else []) for name in CASES]
)
def test_trajectories_are_those_of_diffusers(name: str) -> None:
    for schedule, process, prediction in configurations(name):
        if not loses_digits(name, process, prediction):
            assert measure(name, schedule, process, prediction) < TOLERANCE, (schedule, process, prediction)


@pytest.mark.parametrize("name", LOSING)
def test_where_diffusers_loses_digits_ours_is_nearer_to_float64(name: str) -> None:
    for schedule, process, prediction in configurations(name):
        if loses_digits(name, process, prediction):
            scheduler, noise = build(name, schedule, process, prediction)
            laid = make_schedule(noise, schedule, STEPS, name)
            theirs = run_diffusers(scheduler, CASES[name], STEPS)
            check_grid(scheduler, name, laid, STEPS)
            exact = run_ours(name, noise, laid, dtype=np.float64)
            ours = difference(run_ours(name, noise, laid), exact)
            assert ours < 2e-4
            assert difference(theirs, exact) < 1e-2
            assert ours < max(difference(theirs, exact), 1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_few_steps(name: str, steps: int) -> None:
    for schedule in CASES[name].schedules:
        if (name, steps) != ("deis", 1) or schedule in SPACINGS:  # diffusers goes from the first sigma to itself there
            assert measure(name, schedule, "scaled_linear", "epsilon", steps) < TOLERANCE, schedule


@pytest.mark.parametrize("name", CASES)
def test_offset_and_the_config_of_stable_diffusion(name: str) -> None:
    for schedule in CASES[name].schedules:
        extra: dict[str, Any] = {"steps_offset": 1}
        if schedule in SIGMAS:
            extra["timestep_spacing"] = "leading"
        assert measure(name, schedule, "scaled_linear", "epsilon", **extra) < TOLERANCE, schedule


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("name", ["ddim", "ddim eta", "pndm"])
def test_the_terminal_sigma_is_the_configs(name: str, one: bool) -> None:
    for schedule in DIVIDING:
        assert measure(name, schedule, "scaled_linear", "epsilon", set_alpha_to_one=one) < TOLERANCE, schedule


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp_2m", "unipc", "deis", "lcm"])
def test_models_that_predict_the_sample(name: str) -> None:
    schedule = CASES[name].schedules[0]
    assert measure(name, schedule, "scaled_linear", "sample") < TOLERANCE


@pytest.mark.parametrize("levels", ["StableDiffusion", "StableDiffusionXL"])
def test_align_your_steps(levels: str) -> None:
    """The authors' levels are diffusers' tables; DPM-Solver++ takes them as timesteps, Euler as sigmas."""
    table, name = diffusers.schedulers.AysSchedules, "ays_sd15" if levels == "StableDiffusion" else "ays_sdxl"
    scheduler, noise = build("euler", "linspace", "scaled_linear", "epsilon")
    theirs = run_diffusers(scheduler, CASES["euler"], 10, sigmas=table[f"{levels}Sigmas"])
    laid = make_schedule(noise, name, 10, "euler")
    np.testing.assert_allclose(laid.sigmas, table[f"{levels}Sigmas"], rtol=1e-12)
    assert difference(run_ours("euler", noise, laid), theirs) < TOLERANCE
    assert difference(run_ours("euler", noise, from_sigmas(noise, table[f"{levels}Sigmas"])), theirs) < TOLERANCE

    scheduler, noise = build("dpmpp_2m", "linspace", "scaled_linear", "epsilon")
    timesteps = table[f"{levels}Timesteps"]
    theirs = run_diffusers(scheduler, CASES["dpmpp_2m"], 10, timesteps=timesteps)
    assert difference(run_ours("dpmpp_2m", noise, from_timesteps(noise, timesteps)), theirs) < TOLERANCE


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_flow_matching(shift: float, steps: int) -> None:
    for name, scheduler_class, calls in (
        ("euler", diffusers.FlowMatchEulerDiscreteScheduler, "one"),
        ("heun", diffusers.FlowMatchHeunDiscreteScheduler, "two"),
    ):
        scheduler = scheduler_class(shift=shift)
        noise = NoiseProcess.from_scheduler_config({"_class_name": scheduler_class.__name__, **scheduler.config})
        laid = make_schedule(noise, "flow", steps, name)
        assert difference(run_ours(name, noise, laid), run_flow(scheduler, calls, steps)) < TOLERANCE
        asked = scheduler.timesteps.numpy()[:: 2 if calls == "two" else 1]
        np.testing.assert_allclose(laid.timesteps, asked, rtol=1e-5)


@pytest.mark.parametrize("name", SIGMAS)
def test_flow_matching_with_other_sigmas(name: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **{f"use_{name}_sigmas": True})
    noise = NoiseProcess.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    ours = run_ours("euler", noise, make_schedule(noise, name, STEPS, "euler"))
    assert difference(ours, run_flow(scheduler, "one", STEPS)) < TOLERANCE


def test_the_sigmas_of_flux() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.15)
    noise = NoiseProcess.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    ours = run_ours("euler", noise, make_schedule(noise, "flow_uniform", 4, "euler"))
    assert difference(ours, run_flow(scheduler, "one", 4, sigmas=np.linspace(1.0, 1 / 4, 4))) < TOLERANCE


def run_flow(scheduler: Any, calls: str, steps: int, **set_kwargs: Any) -> list[np.ndarray]:
    scheduler.set_timesteps(**(set_kwargs or {"num_inference_steps": steps}))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    trajectory = []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t)), t, x).prev_sample
        trajectory.append(x.numpy())
    return trajectory if calls == "one" else [*trajectory[1:-1:2], trajectory[-1]]


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_the_training_table_is_diffusers(name: str, zero: bool) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero)
    abar = scheduler.alphas_cumprod.double().numpy().copy()
    if zero:
        abar[-1] = 2.0**-24
    sigmas = NoiseProcess.from_scheduler_config(scheduler.config).sigmas
    np.testing.assert_allclose(1 / (1 + sigmas**2), abar, rtol=3e-6, atol=1.5e-7)


if __name__ == "__main__":
    worst: dict[tuple[str, str], float] = defaultdict(float)
    for sampler_name in CASES:
        for configuration in configurations(sampler_name):
            key = (sampler_name, configuration[0])
            try:
                worst[key] = max(worst[key], measure(sampler_name, *configuration))
            except Exception as e:
                print("FAIL", sampler_name, configuration, str(e)[:600].replace("\n", " "))
    for (sampler_name, schedule_name), error in worst.items():
        print(f"{sampler_name:16} {schedule_name:12} {error:.1e}")
