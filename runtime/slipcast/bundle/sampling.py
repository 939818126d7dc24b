"""The sampling schedule of a bundle."""

from __future__ import annotations

from typing import Self

from pydantic import field_validator, model_validator

from slipcast.bundle.names import Count, Name, Positive
from slipcast.bundle.validation import Strict
from slipcast.errors import RequestError
from slipcast.sampling.denoiser import PREDICTIONS
from slipcast.sampling.guidance import Guidance
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import (
    BETA_SCHEDULES,
    SPACINGS,
    NoiseProcess,
    Schedule,
    from_sigmas,
    from_timesteps,
    make_schedule,
)

MAX_TRAIN_TIMESTEPS = 100_000  # the table of noise levels is this long


class Sampling(Strict):
    """The sampling schedule the bundle was made and judged with; a run may ask for other steps or guidance.

    `guidance_interval` (sigmas) and `guidance_reuse` (evaluations): see guidance.Guidance.
    """

    sampler: Name
    schedule: Name | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    steps: Positive
    guidance_scale: float
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    guidance_reuse: Count = 0
    eta: float = 0.0
    noise: NoiseProcess

    @field_validator("noise")
    @classmethod
    def _known_noise(cls, noise: NoiseProcess) -> NoiseProcess:
        if noise.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is one of {', '.join(PREDICTIONS)}, got {noise.prediction[:100]!r}")
        if noise.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is one of {', '.join(BETA_SCHEDULES)}, got {noise.beta_schedule[:100]!r}")
        if noise.timestep_spacing not in (None, *SPACINGS):
            raise ValueError(f"timestep_spacing is one of {', '.join(SPACINGS)}, got {noise.timestep_spacing[:100]!r}")
        if not 1 <= noise.num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is 1 to {MAX_TRAIN_TIMESTEPS}, got {noise.num_train_timesteps}")
        return noise

    @model_validator(mode="after")
    def _eta_has_a_taker(self) -> Self:
        known = SAMPLERS.get(self.sampler)  # one of a newer runtime is refused on loading
        if self.eta and known and known.eta is None:
            raise ValueError(f"the sampler {self.sampler} takes no eta")
        return self

    @model_validator(mode="after")
    def _interval_is_one(self) -> Self:
        if self.guidance_interval and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("guidance_interval is [low, high] in sigma, rising, neither below 0")
        return self

    @property
    def requires(self) -> tuple[str, ...]:
        """What a reader has to know, to make these pictures and no others."""
        asked = {"guidance_interval": self.guidance_interval, "guidance_reuse": self.guidance_reuse}
        return tuple(name for name, value in asked.items() if value)

    def guidance(self, scale: float | None = None) -> Guidance:
        """Its guidance, with another scale if one is given."""
        chosen = self.guidance_scale if scale is None else scale
        return Guidance(chosen, self.guidance_rescale, self.guidance_interval, self.guidance_reuse)

    def lay(self, steps: int | None = None) -> Schedule:
        """The schedule in full, with `steps` in place of its own number; RequestError where that cannot be."""
        if explicit := self.timesteps or self.sigmas:
            if steps not in (None, self.steps):
                raise RequestError(
                    "num_inference_steps is fixed in this bundle: its schedule is an explicit list",
                    expected=str(self.steps),
                    got=str(steps),
                )
            lay = from_timesteps if self.timesteps else from_sigmas
            return lay(self.noise, explicit, self.sampler)
        return make_schedule(self.noise, self.schedule or "", steps or self.steps, self.sampler)
