"""The record of a loop that slipcast's samplers drive, within a captured program."""

from __future__ import annotations

from typing import Final, Literal

from slipcast.bundle.validation import Strict
from slipcast.sampling.denoiser import input_scale
from slipcast.sampling.schedules import NoiseProcess

Quantity = Literal["timestep", "sigma", "scale", "inverse_scale", "guidance"]
QUANTITIES: Final[tuple[Quantity, ...]] = ("guidance", "timestep", "sigma", "scale", "inverse_scale")


class Column(Strict):
    """An input that is scale * q + offset, in all its elements, of a quantity `of` at an evaluation of the model.

    `timestep`: what the model is told; `sigma`: the noise level; `scale`: the factor from x0 + sigma * noise to what a
    model in variance-preserving coordinates reads, and `inverse_scale` that back; `guidance`: how much there is of it.
    """

    of: Quantity
    scale: float
    offset: float


def quantities(process: NoiseProcess, timestep: float, sigma: float, guidance: float) -> dict[str, float]:
    """By name, those of an evaluation."""
    scale = input_scale(process.prediction, sigma)
    return {
        "timestep": timestep,
        "sigma": sigma,
        "scale": scale,
        "inverse_scale": 1 / scale,
        "guidance": guidance,
    }
