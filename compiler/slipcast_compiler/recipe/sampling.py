"""[sampling], [reference] and what thins the sampling loop out: [timesteps], [cut], [caching], [early_exit]."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from slipcast.bundle.validation import Strict
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import SCHEDULES
from slipcast_compiler.recipe.values import Images, Numbers, Side


class ReferenceTable(Strict):
    """[reference]: the sampling of the original that the bundle is judged against. A named schedule, or explicit
    timesteps or sigmas. What is not given is as in [sampling]."""

    # without: that of a checkpoint distilled to few steps, else dpmpp_2m
    sampler: Literal[tuple(SAMPLERS)] | None = None  # type: ignore[valid-type]
    # without: the checkpoint's, else the sampler's usual one
    schedule: Literal[tuple(SCHEDULES)] | None = None  # type: ignore[valid-type]
    # an explicit list, falling, in place of a schedule
    timesteps: Numbers | None = None
    # an explicit list, falling, with the terminal one, in place of a schedule
    sigmas: Numbers | None = None
    # without: 20, or 4 of a checkpoint distilled to few
    steps: Annotated[int, Field(ge=1)] | None = None
    # 1 and less: no guidance; without: 5, or 1 where there is none to have
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    # how far the guided prediction is brought back to the conditional one's contrast
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = None
    # of ddim: how much noise is drawn in each step
    eta: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        explicit = [name for name in ("timesteps", "sigmas") if getattr(self, name) is not None]
        if len(explicit) + (self.schedule is not None) > 1:
            raise ValueError("give at most one of schedule, timesteps and sigmas")
        if explicit and self.steps is not None:
            raise ValueError(f"steps contradicts {explicit[0]}: the list has its own length")
        return self


class SamplingTable(ReferenceTable):
    """[sampling]: what the bundle runs. `guidance_interval` (sigmas, low and high) and `guidance_reuse` (evaluations)
    say where the unconditional branch is left out: see slipcast.sampling.guidance.Guidance. Sizes in pixels."""

    guidance_interval: Annotated[Numbers, Field(min_length=2, max_length=2)] | None = None
    guidance_reuse: Annotated[int, Field(ge=0, le=100_000)] = 0
    # without: the checkpoint's own
    width: Side | None = None
    # without: the checkpoint's own
    height: Side | None = None

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta belongs to the sampler ddim, not to {self.sampler or 'the default one'}")
        if self.guidance_interval and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("guidance_interval is [low, high] in sigma, rising, neither below 0")
        return self


class TimestepsTable(Strict):
    """[timesteps]: noise levels found for sampling.steps on calibration prompts, against a trajectory of `fine_steps`;
    see timesteps.py. `dp` takes that trajectory's time, `direct` starts there and takes a multiple of it."""

    # dynamic programming, or descent
    method: Literal["dp", "direct"] = "direct"
    # how many calibration prompts they are found on
    prompts: Images = 16
    fine_steps: Annotated[int, Field(ge=4, le=200)] = 48


class CutTable(Strict):
    """What does not depend on the latent leaves the loop. `general`: for timesteps other than the schedule's, too."""

    general: bool = False


class CachingTable(Strict):
    """[caching]: at some steps a shallow denoiser goes on from features of an earlier step: see slipcast.run.caching.

    `full_steps`: how many steps evaluate the whole denoiser; without, half of them. `share`: of the denoiser's
    multiply-adds, what the shallow one may have at the most.
    """

    full_steps: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2

    def full_of(self, steps: int) -> int:
        """How many of so many steps evaluate the whole denoiser."""
        return self.full_steps or math.ceil(steps / 2)


class EarlyExitTable(Strict):
    """[early_exit]: images stop where their clean image has stopped changing: see slipcast.sampling.early_exit.
    `max_error`: how far the latents of calibration prompts may be from those of all steps, on the mean, as a relative
    L2 norm."""

    max_error: Annotated[float, Field(gt=0, lt=1)] = 0.02
    # how many calibration prompts it is measured on
    prompts: Images = 16
