"""From what a model predicts to D(x, sigma), the expected clean latent that samplers work with; and guidance.

Arrays are numpy arrays or torch tensors of shape (batch, ...) and keep their dtype: sigmas are Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slipcast.sampling.samplers import Array, find_sampler
from slipcast.sampling.schedules import NoiseProcess, Schedule


def input_scale(prediction: str, sigma: float) -> float:
    """Factor from x = x0 + sigma * eps to what the model reads: unit variance for VP models, x itself for flow."""
    return 1.0 if prediction == "flow" else 1.0 / math.sqrt(1.0 + sigma * sigma)


def _from_epsilon(x: Array, output: Array, sigma: float) -> Array:
    return x - sigma * output


def _from_v(x: Array, output: Array, sigma: float) -> Array:
    """v = alpha * eps - sigma * x0 in variance-preserving coordinates, Salimans and Ho, arXiv 2202.00512."""
    variance = 1.0 + sigma * sigma
    return x * (1.0 / variance) - output * (sigma / math.sqrt(variance))


def _from_sample(x: Array, output: Array, sigma: float) -> Array:
    return output


# A flow model's velocity is eps - x0 (arXiv 2210.02747), so x_t - t * v is x0: the formula of eps, in other
# coordinates.
PREDICTIONS: dict[str, Callable[[Array, Array, float], Array]] = {
    "epsilon": _from_epsilon,
    "v_prediction": _from_v,
    "sample": _from_sample,
    "flow": _from_epsilon,
}


def guide(cond: Array, uncond: Array, scale: float, rescale: float = 0.0) -> Array:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) of model outputs, shape (batch, ...).

    `rescale` pulls the result's standard deviation, per sample, back to that of `cond` (Lin et al., arXiv 2305.08891,
    section 3.4): 0 not at all, 1 wholly. scale = 1 returns `cond` itself.
    """
    if scale == 1.0:
        return cond
    guided = uncond + scale * (cond - uncond)
    if rescale == 0.0:
        return guided
    ratio = (_variance(cond) / _variance(guided)) ** 0.5
    return guided * (rescale * ratio + (1.0 - rescale))


def _variance(x: Array) -> Array:
    """Variance of each sample, keeping axes; up to a constant factor, which the ratio of two of them does not see."""
    axes = tuple(range(1, x.ndim))
    deviation = x - x.mean(axes).reshape(-1, *(1 for _ in axes))
    return (deviation * deviation).mean(axes).reshape(-1, *(1 for _ in axes))


Evaluate = Callable[[Array, float, bool], tuple[Array, Array]]


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
        return denoised if limit is None else denoised.clip(-limit, limit)


@dataclass(frozen=True)
class Guidance:
    """How much classifier-free guidance, and at which evaluations the unconditional branch is worth its time.

    `interval`: (low, high) in sigma, both included, outside of which there is no guidance (Kynkaanniemi et al., arXiv
    2404.07724). `reuse`: for so many evaluations after one of both branches, the gap between their outputs is taken to
    be what it was (it changes slowly: the CFG-Cache of FasterCache, arXiv 2410.19355).
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    reuse: int = 0

    def applies(self, sigma: float) -> bool:
        """Whether there is guidance at that noise level."""
        return self.scale > 1.0 and (self.interval is None or self.interval[0] <= sigma <= self.interval[1])


class Guided:
    """D(x, sigma) of a model with guidance, for one run of a sampler: it remembers the last gap.

    `evaluate(scaled_x, timestep, both)` is the model: its conditional output and, if asked for both, the unconditional
    one (else None). What is evaluated depends on sigma and the order of calls alone, so rows of a batch are
    what they would be by themselves.
    """

    def __init__(self, process: NoiseProcess, schedule: Schedule, evaluate: Evaluate, guidance: Guidance) -> None:
        self._process, self._schedule, self._evaluate, self._guidance = process, schedule, evaluate, guidance
        self._gap: Array = None
        self._left = 0  # evaluations for which the gap may be taken again

    def __call__(self, x: Array, sigma: float) -> Array:
        predict = self._guided if self._guidance.applies(sigma) else self._conditional
        return Denoiser(self._process, self._schedule, predict)(x, sigma)

    def _conditional(self, x: Array, timestep: float) -> Array:
        return self._evaluate(x, timestep, False)[0]

    def _guided(self, x: Array, timestep: float) -> Array:
        fresh = self._left == 0
        cond, uncond = self._evaluate(x, timestep, fresh)
        if not fresh:
            self._left -= 1
            uncond = cond - self._gap
        elif self._guidance.reuse:
            self._gap, self._left = cond - uncond, self._guidance.reuse
        return guide(cond, uncond, self._guidance.scale, self._guidance.rescale)


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
    return input_scale(process.prediction, schedule.sigmas[-1])
