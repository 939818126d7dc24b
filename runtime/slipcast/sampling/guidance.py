"""Classifier-free guidance: of what a model predicts, how much of it, and at which evaluations it is worth its time.

Arrays are numpy arrays or torch tensors of shape (batch, ...) and keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slipcast.sampling.denoiser import Denoiser
from slipcast.sampling.samplers import Array
from slipcast.sampling.schedules import NoiseProcess, Schedule

Evaluate = Callable[[Array, float, bool], tuple[Array, Array]]
"""(scaled x, timestep, both branches?) -> the conditional output and, if asked for both, the unconditional one."""


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
