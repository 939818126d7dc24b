"""Whether diffusers' scheduler and our sampler make one picture of one config: both are run on a toy model."""

from __future__ import annotations

import math
from typing import Any

from slipcast.bundle.manifest import Sampling
from slipcast.errors import RecipeError
from slipcast.sampling.denoiser import Denoiser, final_scale, initial_scale
from slipcast.sampling.samplers import base_name, find_sampler, sample
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.original import make_scheduler
from slipcast_compiler.model.scheduler import FILE

SHAPE, SEED = (1, 3, 8, 8), 7
TOLERANCE = 2e-3  # relative; float32 is within 1e-4
# v prediction at sigmas of 20,000: diffusers' schedulers lose digits there (tests/runtime/test_diffusers_parity.py)
TOLERANCE_COSINE_V = 2e-2


def check_agreement(sampling: Sampling, config: Any) -> None:
    """RecipeError where diffusers' scheduler, made of the checkpoint's config, does not make our pictures.

    What a key of the config does is read in model/scheduler.py; this finds what was read wrongly, or not at all.
    """
    steep = sampling.noise.beta_schedule == "squaredcos_cap_v2" and sampling.noise.prediction == "v_prediction"
    try:
        with quiet():
            apart = difference(sampling, config)
    except Exception as error:  # whatever a scheduler makes of a config, the pipeline would make of it too
        raise RecipeError(
            f"{FILE}: diffusers cannot run {sampling.sampler} with it", expected="a config of that scheduler",
            got=f"{type(error).__name__}: {error}".splitlines()[0], hint="choose another sampler or schedule",
        ) from error  # fmt: skip
    if apart is None or apart < (TOLERANCE_COSINE_V if steep else TOLERANCE):
        return
    if math.isnan(apart):
        raise RecipeError(
            f"{FILE}: diffusers' pictures are not finite with the sampler {sampling.sampler}",
            expected="a config that diffusers can draw with", got="NaN on a toy model",
            hint="choose another sampler or schedule for [sampling] and [reference]",
        )  # fmt: skip
    raise RecipeError(
        f"{FILE}: diffusers makes other pictures of it than the sampler {sampling.sampler}",
        expected=f"a relative difference below {TOLERANCE:g}", got=f"{apart:.3g} on a toy model",
        hint="choose another sampler or schedule for [sampling] and [reference]",
    )  # fmt: skip


def difference(sampling: Sampling, config: Any) -> float | None:
    """Relative, of the clean latents; None where diffusers has no such scheduler."""
    import torch

    scheduler = make_scheduler(sampling, config)
    if scheduler is None:
        return None
    theirs, ours = _theirs(scheduler, sampling), _ours(sampling)
    return float(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs))


def _model(x: Any, timestep: float) -> Any:
    """Smooth, nonlinear, and of the size of noise."""
    import torch

    phase = torch.sin(torch.arange(x.shape[1]) + timestep / 300)[:, None, None]
    return 0.6 * x + 0.8 * torch.tanh(0.7 * x.roll(1, 1) - 0.3 * x.roll(1, 2) + 0.5 * phase)


def _theirs(scheduler: Any, sampling: Sampling) -> Any:
    """The loop of diffusers' pipelines."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    chosen = find_sampler(sampling.sampler)
    extra: dict[str, Any] = {"generator": generator} if chosen.stochastic or sampling.eta else {}
    if base_name(sampling.sampler) == "ddim":
        extra["eta"] = sampling.eta
    scheduler.set_timesteps(sampling.steps)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(_model(scaled, float(t)), t, x, **extra).prev_sample
    return x


def _ours(sampling: Sampling) -> Any:
    import torch

    generator, schedule = torch.Generator().manual_seed(SEED), sampling.lay()
    x = torch.randn(SHAPE, generator=generator) * initial_scale(sampling.noise, schedule, sampling.sampler)
    denoise = Denoiser(sampling.noise, schedule, _model)
    noise = lambda: torch.randn(SHAPE, generator=generator)  # noqa: E731 - read where it is drawn
    *_, x = sample(sampling.sampler, denoise, x, schedule.sigmas, noise=noise, eta=sampling.eta)
    return x * final_scale(sampling.noise, schedule)
