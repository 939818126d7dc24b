"""What a program's results are: pictures, frames of a video, a sound, or arrays; and how many of them a second has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from slipcast.bundle.program import Output
from slipcast.errors import RecipeError
from slipcast_compiler.capture.program import Call, Op, Program, Ref

RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")  # in the config of what makes a sound
FRAME_RATES = ("frame_rate", "fps")  # among the arguments of a call
MOST_CHANNELS = 8  # of a sound


@dataclass(frozen=True)
class Gives:
    """What results are: those that are `values`, of one kind; `rate`: frames or samples a second, where the pipeline
    says so. `sound`: of videos, the value that is their sound, and its rate."""

    kind: Output
    values: tuple[int, ...]
    rate: float | None
    sound: tuple[int, float] | None = None


def output_of(program: Program, pipe: Any, fixed: Mapping[str, Any]) -> Gives:
    """What all results are; `fixed`: what the pipeline was called with besides texts and pictures. RecipeError where
    they are of several kinds, but for videos and their sound.

    A picture, or a video, is clamped to [0, 1] somewhere. A sound is made last by a component whose config has a
    sampling rate.
    """
    found = {value.id: _kind(program, pipe, value) for _, value in program.results if isinstance(value, Ref)}
    sounds = [(value, rate) for value, (kind, rate) in found.items() if kind == "audio" and rate]
    kinds = {kind for kind, _ in found.values()}
    sound = sounds[0] if kinds == {"frames", "audio"} and len(sounds) == 1 else None
    values = tuple(value for value in found if not sound or value != sound[0])
    named = list(dict.fromkeys(found[value][0] for value in values))
    if len(named) > 1:
        raise RecipeError(
            f"{program.pipeline} returns more than one kind of result",
            expected="pictures, videos, sounds or arrays",
            got=" and ".join(named),
        )
    kind, rate = found[values[0]]
    given = [fixed[name] for name in FRAME_RATES if isinstance(fixed.get(name), int | float) and fixed[name] > 0]
    rate = (float(given[0]) if given else None) if kind == "frames" else rate
    return Gives(kind, values, rate, sound)


def _kind(program: Program, pipe: Any, value: Ref) -> tuple[Output, float | None]:
    """Of one result; of a sound with its rate."""
    shape, dtype = program.specs[value.id]
    events = [program.events[place] for place in sorted(program.needed_for([value]))]
    if dtype != torch.float32:
        return "array", None
    channels = shape[1] if len(shape) == 3 else 1
    if len(shape) in (2, 3) and isinstance(channels, int) and channels <= MOST_CHANNELS:
        rate = _rate(pipe, events)
        return ("audio", rate) if rate else ("array", None)
    clamped = any(isinstance(event, Op) and _clamps(event) for event in events)
    if clamped and len(shape) in (4, 5) and shape[-3] in (1, 3, 4):
        return ("image" if len(shape) == 4 else "frames"), None
    return "array", None


def _clamps(event: Op) -> bool:
    return "clamp" in str(event.function) and (*event.args, *event.kwargs.values())[-2:] == (0, 1)


def _rate(pipe: Any, events: list[Op | Call]) -> float | None:
    """The sampling rate of the component that was called last."""
    called = [event.module for event in events if isinstance(event, Call)]
    config = getattr(pipe.components[called[-1].partition(".")[0]], "config", None) if called else None
    rates = (getattr(config, name, None) for name in RATES)
    return next((float(rate) for rate in rates if isinstance(rate, int | float) and rate > 0), None)
