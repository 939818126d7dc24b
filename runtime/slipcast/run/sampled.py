"""The loop of a captured program, where slipcast's samplers take its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipcast.bundle.driving import quantities
from slipcast.bundle.program import Loop, ProgramCall
from slipcast.bundle.records import Component
from slipcast.run.calls import Calls
from slipcast.run.loop import check_finite
from slipcast.sampling.denoiser import Denoiser, final_scale, input_scale
from slipcast.sampling.samplers import sample
from slipcast.sampling.schedules import Schedule

Array = Any


@dataclass(frozen=True)
class Sampled:
    """A loop, as a run asks for it. `contracts`: by component."""

    loop: Loop
    schedule: Schedule
    guidance: float
    contracts: Mapping[str, Component]

    def before(self, call: ProgramCall) -> dict[str, Array]:
        """The inputs of a call before the loop that are neither values nor of the table: as at its first evaluation."""
        return self._columns(call, self.schedule.timesteps[0], self.schedule.sigmas[0])

    def steps(self, calls: Calls, images: int) -> Iterator[int]:
        """Take the steps, for so many images at once: yields the number of each, counted from 0, after it."""
        loop, settings, process = self.loop, self.loop.sampling, self.loop.sampling.noise
        values, count = calls.values, 0
        first = np.concatenate([values.get(loop.sample, image) for image in range(images)])
        rows = len(first) // images
        shape = (rows, *first.shape[1:])

        def denoise(x: Array, sigma: float) -> Array:
            def predict(scaled: Array, timestep: float) -> Array:
                nonlocal count
                count += 1
                return self._evaluate(scaled, timestep, sigma, calls, f"evaluation {count}")

            return Denoiser(process, self.schedule, predict)(x, sigma)

        def noise() -> Array:
            return np.concatenate([values.more_noise(image, shape) for image in range(images)])

        x = first / input_scale(process.prediction, self.schedule.sigmas[0]) if loop.vp else first
        taken = sample(settings.sampler, denoise, x, self.schedule.sigmas, noise=noise, eta=settings.eta or None)
        for step, x in enumerate(taken):
            check_finite(x, f"latents are not finite after step {step + 1} of {len(self.schedule.timesteps)}")
            yield step
        x = x * final_scale(process, self.schedule)
        for image in range(images):
            values.put(loop.result, image, x[image * rows : (image + 1) * rows])
        values.drop(value for call in loop.calls for value in call.outputs.values())

    def _evaluate(self, scaled: Array, timestep: float, sigma: float, calls: Calls, where: str) -> Array:
        """What the model gives for all images, whose rows follow each other."""
        loop, values = self.loop, calls.values
        given = scaled if loop.vp else scaled / input_scale(loop.sampling.noise.prediction, sigma)
        images = len(values.images(loop.output))
        for image, part in enumerate(np.split(given, images)):
            values.put(loop.sample, image, part)
        for call in loop.calls:
            calls(call, self._columns(call, timestep, sigma), where)
        return np.concatenate([values.get(loop.output, image) for image in range(images)])

    def _columns(self, call: ProgramCall, timestep: float, sigma: float) -> dict[str, Array]:
        at = quantities(self.loop.sampling.noise, timestep, sigma, self.guidance)
        found = {}
        for spec in self.contracts[call.component].inputs:
            if column := self.loop.columns.get(f"{call.component}.{spec.name}"):
                number = column.scale * at[column.of] + column.offset
                shape = tuple(size for size in spec.shape if isinstance(size, int))
                told = number if spec.dtype.startswith("float") else round(number)
                found[spec.name] = np.full(shape, told, spec.dtype)
        return found
