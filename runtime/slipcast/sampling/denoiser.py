"""From what a model predicts to D(x, sigma), the expected clean latent that samplers work with.

Arrays are numpy arrays or torch tensors of shape (batch, ...) and keep their dtype: sigmas are Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slipcast.sampling.samplers import Array, find_sampler
from slipcast.sampling.schedules import NoiseProcess, Schedule


def input_scale(prediction: str, sigma: float) -> float:
    """Factor from x = x0 + sigma * eps to what the model reads: unit variance for VP models; for flow x itself, which
    is (1 - t) * x0 + t * eps, and for flow_ratio, whose sigma is t / (1 - t), the same."""
    if prediction == "flow":
        return 1.0
    return 1.0 / (1.0 + sigma) if prediction == "flow_ratio" else 1.0 / math.sqrt(1.0 + sigma * sigma)


def _from_epsilon(x: Array, output: Array, sigma: float) -> Array:
    return x - sigma * output


def _from_v(x: Array, output: Array, sigma: float) -> Array:
    """v = alpha * eps - sigma * x0 in variance-preserving coordinates, Salimans and Ho, arXiv 2202.00512."""
    variance = 1.0 + sigma * sigma
    return x * (1.0 / variance) - output * (sigma / math.sqrt(variance))


def _from_sample(x: Array, output: Array, sigma: float) -> Array:
    return output


def _from_velocity(x: Array, output: Array, sigma: float) -> Array:
    """Of a flow model, eps - x0, where x is x0 + sigma * eps: x_t - t * v for x_t = x / (1 + sigma)."""
    return (x - sigma * output) * (1.0 / (1.0 + sigma))


# A flow model's velocity is eps - x0 (arXiv 2210.02747), so x_t - t * v is x0: the formula of eps, in other
# coordinates.
PREDICTIONS: dict[str, Callable[[Array, Array, float], Array]] = {
    "epsilon": _from_epsilon,
    "v_prediction": _from_v,
    "sample": _from_sample,
    "flow": _from_epsilon,
    "flow_ratio": _from_velocity,
}


@dataclass(frozen=True)
class Denoiser:
    """D(x, sigma) of a model.

    `predict(scaled_x, timestep)` is the model with its conditioning bound and guidance applied; its output has x's
    shape.
    """

    process: NoiseProcess
    schedule: Schedule
    predict: Callable[[Array, float], Array]

    def __call__(self, x: Array, sigma: float) -> Array:
        prediction = self.process.prediction
        scale = input_scale(prediction, sigma)
        output = self.predict(x if scale == 1.0 else x * scale, self.schedule.timestep(sigma))
        denoised = PREDICTIONS[prediction](x, output, sigma)
        limit = self.process.clip_sample
        if limit is None:
            return denoised
        clipped = denoised.clip(-limit, limit)
        if not self.process.keeps_noise:
            return clipped
        # The step goes to clipped + t * (x - denoised) / sigma, where the next sigma is t; the one that samplers make
        # of D, D + t * (x - D) / sigma, is the same for this D. At the last step t is 0, and D what was clipped.
        ratio = self.schedule.after(sigma) / sigma
        return clipped + (ratio / (1 - ratio)) * (clipped - denoised)


def initial_scale(process: NoiseProcess, schedule: Schedule | float, sampler: str = "dpmpp_2m") -> float:
    """Factor from unit noise to the first x of a schedule (or of a first sigma), as diffusers has it for that sampler.

    Schedulers in variance-preserving coordinates start from unit noise, which is sqrt(1 + sigma^2) here. Euler's family
    does so for leading spacing only, and otherwise starts from sigma times noise. Flow starts from noise.
    """
    sigma, spacing = (schedule.sigmas[0], schedule.spacing) if isinstance(schedule, Schedule) else (schedule, None)
    grid = find_sampler(sampler).grid
    unit_noise = grid.start == "vp" or (spacing or process.timestep_spacing or grid.spacing) == "leading"
    return 1.0 / input_scale(process.prediction, sigma) if unit_noise or process.prediction == "flow" else sigma


def final_scale(process: NoiseProcess, schedule: Schedule) -> float:
    """Factor from the last x to the clean latent: not quite 1 where the terminal sigma is not 0 (PNDM, DEIS)."""
    return input_scale(process.prediction, schedule.sigmas[-1]) if schedule.vp else 1.0
