"""The loop of a captured program, where slipcast's samplers take its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipcast.bundle.driving import quantities
from slipcast.bundle.program import Loop, ProgramCall
from slipcast.bundle.records import Component
from slipcast.run.calls import Calls
from slipcast.run.loop import Indices, check_finite
from slipcast.sampling.denoiser import Denoiser, final_scale, input_scale
from slipcast.sampling.early_exit import EarlyExit
from slipcast.sampling.samplers import sample
from slipcast.sampling.schedules import Schedule

Array = Any


@dataclass(frozen=True)
class Sampled:
    """A loop, as a run asks for it. `contracts`: by component; `rows`: by call of an evaluation, what its row of the
    table gives, and `unguided_rows` of one without guidance. `threshold`: of EarlyExit; None: none stops early. `mask`:
    by evaluation, whether it is a full one, as all are after it."""

    loop: Loop
    schedule: Schedule
    guidance: float
    contracts: Mapping[str, Component]
    rows: Sequence[Mapping[str, Array]]
    unguided_rows: Sequence[Mapping[str, Array]] = ()
    threshold: float | None = None
    mask: tuple[bool, ...] = ()

    def before(self, call: ProgramCall) -> dict[str, Array]:
        """The inputs of a call before the loop that are neither values nor of the table: as at its first evaluation."""
        return self._columns(call, self.schedule.timesteps[0], self.schedule.sigmas[0])

    def run(self, calls: Calls, images: int, ended: Callable[[int], None]) -> tuple[int, ...]:
        """Take the steps, for so many images at once, and put the results: how many steps each image took. `ended` is
        given the number of each step, counted from 0, after it."""
        loop, settings, process = self.loop, self.loop.sampling, self.loop.sampling.noise
        values, count, guidance = calls.values, 0, settings.guidance(self.guidance)
        first: Array = np.stack([values.get(loop.sample, image) for image in range(images)])

        def denoise(x: Array, sigma: float) -> Array:
            def predict(scaled: Array, timestep: float) -> Array:
                nonlocal count
                full, count = self.mask[count : count + 1] != (False,), count + 1
                chosen = self._calls(full, guidance.applies(sigma))
                return self._evaluate(scaled, timestep, sigma, calls, chosen, exits.left, f"evaluation {count}")

            return Denoiser(process, self.schedule, predict)(x, sigma)

        def noise() -> Array:
            return np.stack([values.more_noise(image, first.shape[1:]) for image in range(images)])

        exits = EarlyExit(denoise, self.threshold, images)
        x: Array = first / input_scale(process.prediction, self.schedule.sigmas[0]) if loop.vp else first
        taken = sample(settings.sampler, exits, x, self.schedule.sigmas, noise=noise, eta=settings.eta or None)
        for step, x in enumerate(taken):
            check_finite(x, f"latents are not finite after step {step + 1} of {len(self.schedule.timesteps)}")
            ended(step)
            if not exits.end_step():
                break
        for image, result in enumerate(exits.results(x * final_scale(process, self.schedule))):
            values.put(loop.result, image, result)
        values.drop(value for call in (*loop.calls, *loop.unguided) for value in call.outputs.values())
        return tuple(map(int, exits.steps))

    def _calls(self, full: bool, guided: bool) -> list[tuple[ProgramCall, Mapping[str, Array]]]:
        """Of an evaluation, with what the table gives."""
        if self.loop.unguided and not guided:
            return list(zip(self.loop.unguided, self.unguided_rows, strict=True))
        if full:
            return list(zip(self.loop.calls, self.rows, strict=True))
        return [(call, {}) for call in self.loop.shallow_calls]

    def _evaluate(
        self, scaled: Array, timestep: float, sigma: float, calls: Calls,
        chosen: Sequence[tuple[ProgramCall, Mapping[str, Array]]], left: Indices, where: str,
    ) -> Array:  # fmt: skip
        """What the model gives for the images that are left; of the others, what it would be given. Features stay among
        the values, from a full evaluation to the next."""
        loop, values = self.loop, calls.values
        given = scaled if loop.vp else scaled / input_scale(loop.sampling.noise.prediction, sigma)
        images = [int(image) for image in left]
        for image in images:
            values.put(loop.sample, image, given[image])
        for call, row in chosen:
            calls(call, {**row, **self._columns(call, timestep, sigma)}, where, images)
        found = given.copy()
        for image in images:
            found[image] = values.get(loop.output, image)
        return found

    def _columns(self, call: ProgramCall, timestep: float, sigma: float) -> dict[str, Array]:
        return columns(self.loop, call, self.contracts[call.component], timestep, sigma, self.guidance)


def columns(
    loop: Loop, call: ProgramCall, contract: Component, timestep: float, sigma: float, guidance: float
) -> dict[str, Array]:
    """By input, what a call is given that is neither a value nor of the table, at an evaluation of the model."""
    at = quantities(loop.sampling.noise, timestep, sigma, guidance)
    found = {}
    for spec in contract.inputs:
        if column := loop.columns.get(f"{call.component}.{spec.name}"):
            number = column.scale * at[column.of] + column.offset
            shape = tuple(size for size in spec.shape if isinstance(size, int))
            told = number if spec.dtype.startswith("float") else round(number)
            found[spec.name] = np.full(shape, told, spec.dtype)
    return found
