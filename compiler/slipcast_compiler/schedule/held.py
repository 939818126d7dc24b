"""The loop of a captured program, held still: its model for some images, to be evaluated at any latent and noise level.

Imports nothing that the runtime does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.program import Loop, Variant
from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.bundle.records import Component
from slipcast.bundle.sources import NoiseSource
from slipcast.engines import Engine
from slipcast.run.load import load
from slipcast.run.residency import InUse
from slipcast.run.sampled import columns
from slipcast.run.values import Noise
from slipcast.run.variants import read_variants
from slipcast.sampling.denoiser import input_scale
from slipcast_compiler.engines.recording import Images, Recording

Array = Any


@dataclass(frozen=True)
class Held:
    """`first`: the images' first latents, as values of the program, float32 [n, *latent]. `values`: of each, what else
    the loop's calls read; `rows`: by call, what the table gives it."""

    loop: Loop
    first: Array
    values: tuple[Mapping[str, Array], ...]
    rows: tuple[Mapping[str, Array], ...]
    contracts: Mapping[str, Component]
    engines: Callable[[str], Engine]

    def start(self, sigma: float) -> Array:
        """x at that first noise level, which has to be the schedule's own where the program scales noise to it."""
        if not self.loop.vp:
            return self.first + 0
        return self.first / input_scale(self.loop.sampling.noise.prediction, sigma)

    def predict(self, scaled: Array, timestep: float, sigma: float) -> Array:
        """What the model gives, as sampling.denoiser.Denoiser asks for it; guidance lies within it."""
        loop, found = self.loop, scaled.copy()
        given = scaled if loop.vp else scaled / input_scale(loop.sampling.noise.prediction, sigma)
        for place, held in enumerate(self.values):
            values = {**held, loop.sample: given[place]}
            for call, row in zip(loop.calls, self.rows, strict=True):
                contract, scale = self.contracts[call.component], loop.sampling.guidance_scale
                inputs = {**row, **columns(loop, call, contract, timestep, sigma, scale)}
                inputs |= {name: values[value] for name, value in call.inputs.items()}
                outputs = self.engines(call.component)(inputs)
                values |= {value: outputs[name] for name, value in call.outputs.items()}
            found[place] = values[loop.output]
        return found


@contextmanager
def hold(root: Path, target: str, images: Images, given: Mapping[str, Any]) -> Iterator[Held]:
    """The default variant of the bundle at `root`, for images by prompt and seed; `given`: what its calls take besides.

    Each image is drawn once, to see what the loop reads.
    """
    bundle = open_any_bundle(root)
    assert isinstance(bundle, ProgramBundle)
    assert bundle.manifest.program.loop
    variant, contracts = bundle.manifest.program, bundle.manifest.components
    loop, values, first = bundle.manifest.program.loop, [], []
    rows = read_variants(bundle)[0].loop_rows
    recording = Recording({*(call.component for call in loop.calls), *makers(variant)})
    with load(root, target=target, residency="sequential", instrument=recording) as pipe:
        for prompt, seed in images:
            recording.calls.clear()
            pipe(prompt, seed=seed, output_type="np", **given)
            values.append(_read(loop, recording))
            first.append(first_latent(variant, draws(variant, seed), recording))
    with load(root, target=target, residency="sequential") as pipe, InUse(pipe.residency) as engines:
        yield Held(loop, np.stack(first), tuple(values), tuple(rows), contracts, engines)


def _read(loop: Loop, recording: Recording) -> dict[str, Array]:
    """What the loop's calls read at their first evaluation, by value."""
    found: dict[str, Array] = {}
    for call in loop.calls:
        arrays = recording.evaluations(call.component)[0]
        found |= {value: arrays[name] for name, value in call.inputs.items()}
    return found


def draws(variant: Variant, seed: int) -> Noise:
    """The noise of a seed."""
    return Noise([source for source in variant.sources if isinstance(source, NoiseSource)], seed)


def first_latent(variant: Variant, noise: Noise, recording: Recording) -> Array:
    """What the loop begins with, [*latent], of a run whose `makers` were recorded; `noise`: of its seed."""
    assert variant.loop
    for component, (value, name) in makers(variant).items():
        if value == variant.loop.sample:
            return recording.evaluations(component)[0][name]
    return noise(variant.loop.sample)


def predictions(variant: Variant, recording: Recording) -> list[Array]:
    """Of each evaluation of such a run, in order."""
    assert variant.loop
    names = {made: name for made, (value, name) in makers(variant).items() if value == variant.loop.output}
    return [arrays[names[component]] for component, arrays in recording.calls if component in names]


def makers(variant: Variant) -> dict[str, tuple[str, str]]:
    """The components that make the loop's first latent, if it is not drawn, and its predictions: the value that each
    makes, and the name of that output."""
    assert variant.loop
    wanted = (variant.loop.sample, variant.loop.output)
    return {
        call.component: (value, name)
        for call in variant.every_call
        for name, value in call.outputs.items()
        if value in wanted
    }
