"""Whether slipcast's samplers can take the place of a pipeline's scheduler.

The scheduler's class and config name a sampler, a noise process and a schedule. That these make the same pictures is
seen by running both on a stand-in for the model: the arithmetic of the scheduler as it was captured, and the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from slipcast.bundle.sampling import Sampling
from slipcast.errors import RecipeError, RequestError
from slipcast.sampling.denoiser import Denoiser, input_scale
from slipcast.sampling.samplers import find_sampler, sample
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.capture.program import Program, Ref, refs
from slipcast_compiler.capture.replay import run
from slipcast_compiler.model.scheduler import CLASSES, read_process, usual_schedule, with_options

LIMIT = 1e-4  # of the relative L2 error of what the model is given, and of the result
FLOW = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun"}
Array = Any


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the model: what it is told, and the noise level."""

    timestep: float
    sigma: float


@dataclass(frozen=True)
class Driven:
    """A program's sampling, and its evaluations of the model, in order."""

    sampling: Sampling
    evaluations: tuple[Evaluation, ...]


def drive(program: Program, scheduler: Any, steps: int) -> Driven:
    """The sampling that makes what the program's scheduler makes.

    RecipeError, in words for who asks why a run cannot choose its steps, where there is none.
    """
    check_form(program)
    if scheduler is None:
        raise not_driven("it has several schedulers", program.pipeline)
    errors = []
    for sampling in _candidates(program, scheduler, steps):
        error = math.inf
        try:
            evaluations, error = compare(program, sampling)
        except (RequestError, ValueError) as refused:
            errors.append(str(refused).splitlines()[0])
        if error <= LIMIT:
            return Driven(sampling, evaluations)
        errors.append(f"{sampling.sampler} on {sampling.schedule or 'its noise levels'} is {error:.2g} off")
    raise not_driven("its scheduler takes other steps than slipcast's samplers", "; ".join(dict.fromkeys(errors)))


def drive_again(program: Program, driven: Driven, steps: int) -> Driven:
    """The same for a program of another number of steps, by the same sampling; RecipeError likewise."""
    check_form(program)
    sampling = driven.sampling.model_copy(update={"steps": steps})
    if not sampling.schedule:
        raise not_driven("its noise levels follow no schedule that slipcast has", "a list")
    try:
        evaluations, error = compare(program, sampling)
    except (RequestError, ValueError) as refused:
        raise not_driven(
            "its noise levels follow no schedule that slipcast has", str(refused).splitlines()[0]
        ) from None
    if error > LIMIT:
        raise not_driven("its noise levels follow no schedule that slipcast has", f"{error:.2g} off in {steps} steps")
    return Driven(sampling, evaluations)


def check_form(program: Program) -> None:
    """RecipeError where more than the scheduler's step leads from one evaluation of the model to the next."""
    if not program.marks:
        raise not_driven("its scheduler takes no step", "none")
    for mark in program.marks:
        if not all(isinstance(each, Ref) for each in (mark.output, mark.sample, mark.result)):
            raise not_driven("its scheduler is given what does not depend on noise", "constants")
        if program.specs[mark.output.id][0] != program.specs[mark.sample.id][0]:
            raise not_driven("its model gives more than a sample", str(program.specs[mark.output.id][0]))
    if any(before.result != after.sample for before, after in pairwise(program.marks)):
        raise not_driven("its latents are changed between two steps", program.pipeline)


def not_driven(why: str, got: str) -> RecipeError:
    """Why the scheduler's own arithmetic stays in the program."""
    return RecipeError(why, expected="one of slipcast's samplers, and nothing else between two evaluations", got=got)


def _candidates(program: Program, scheduler: Any, steps: int) -> list[Sampling]:
    config = {**dict(scheduler.config), "_class_name": type(scheduler).__name__}
    name = config["_class_name"]
    if name in FLOW:
        return _flows(program, config, FLOW[name], steps)
    if config.get("use_flow_sigmas"):
        return _ratios(config, steps)
    found = []
    for base, (class_name, settings) in CLASSES.items():
        if class_name == name and all(config.get(key, value) == value for key, value in settings.items()):
            process, sampler = read_process(config, base, prompted=False), with_options(config, base)
            schedule = usual_schedule(config, base)
            found.append(Sampling(sampler=sampler, schedule=schedule, steps=steps, guidance_scale=1.0, noise=process))
    if not found:
        raise not_driven(f"slipcast has no sampler in the place of {name}", name)
    return found


def _ratios(config: Mapping[str, Any], steps: int) -> list[Sampling]:
    """Of flow matching, by a solver that works on noise over signal."""
    process = replace(
        NoiseProcess(prediction="flow_ratio"),
        num_train_timesteps=config["num_train_timesteps"],
        shift=float(config.get("flow_shift") or 1.0),
        final_sigmas_type=config.get("final_sigmas_type", "zero"),
    )
    found = []
    for base, (class_name, settings) in CLASSES.items():
        if class_name == config["_class_name"] and all(config.get(key, each) == each for key, each in settings.items()):
            sampler = with_options(config, base)
            found.append(
                Sampling(sampler=sampler, schedule="flow_even", steps=steps, guidance_scale=1.0, noise=process)
            )
    if not found:
        raise not_driven(f"slipcast has no sampler in the place of {config['_class_name']}", "use_flow_sigmas")
    return found


def _flows(program: Program, config: Mapping[str, Any], sampler: str, steps: int) -> list[Sampling]:
    """Of flow matching: the schedules whose times are shifted by a number, which the pipeline may have computed; and
    else the noise levels that it had."""
    process, sigmas = NoiseProcess.from_scheduler_config(config), program.sigmas
    shifts = [process.shift]
    if steps > 1 and len(sigmas) == steps + 1 and 0 < sigmas[1] < 1:
        level, time = sigmas[1], 1 - 1 / steps
        shifts.append(level * (1 - time) / (time * (1 - level)))

    def found(**how: Any) -> Sampling:
        return Sampling(sampler=sampler, guidance_scale=1.0, **how)

    uniform = [found(schedule="flow_uniform", steps=steps, noise=replace(process, shift=shift)) for shift in shifts]
    listed = [found(sigmas=sigmas, steps=len(sigmas) - 1, noise=process)] if len(sigmas) > 1 else []
    return [found(schedule="flow", steps=steps, noise=process), *uniform, *listed]


def compare(program: Program, sampling: Sampling) -> tuple[tuple[Evaluation, ...], float]:
    """Run the sampler, and then the scheduler's captured arithmetic, on a stand-in for the model; what it was told, and
    the relative L2 error of the worst of all that it was given, and of the result."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(_shape(program, program.marks[0].sample.id), generator=generator)
    draws = _draws(program, generator)
    schedule, process = sampling.lay(), sampling.noise
    vp, prediction = find_sampler(sampling.sampler).grid.start == "vp", process.prediction
    evaluations, given = list[Evaluation](), list[torch.Tensor]()

    def denoise(x: Array, sigma: float) -> Array:
        def predict(scaled: Array, timestep: float) -> Array:
            evaluations.append(Evaluation(timestep, sigma))
            given.append(scaled)
            return _stand_in(scaled, len(given))

        return Denoiser(process, schedule, predict)(x, sigma)

    left = list(draws.values())

    def noise() -> torch.Tensor:
        if not left:
            raise ValueError(f"{sampling.sampler} draws more noise than the scheduler")
        return left.pop(0)

    x = first / input_scale(prediction, schedule.sigmas[0]) if vp else first
    steps = sample(sampling.sampler, denoise, x, schedule.sigmas, noise=noise, eta=None)
    *_, last = steps
    if len(evaluations) != len(program.marks):
        return tuple(evaluations), math.inf
    scales = [1.0 if vp else input_scale(prediction, each.sigma) for each in evaluations]
    wanted, result = _replayed(program, first, draws, scales)
    scale = input_scale(process.prediction, schedule.sigmas[-1]) if schedule.vp else 1.0
    pairs = [*zip(given, wanted, strict=True), (last * scale, result)]
    return tuple(evaluations), max(_error(found, right) for found, right in pairs)


def _shape(program: Program, value: int) -> tuple[int, ...]:
    shape = program.specs[value][0]
    if not all(isinstance(size, int) for size in shape):
        raise not_driven("the size of its latents follows the length of a text", str(list(map(str, shape))))
    return tuple(size for size in shape if isinstance(size, int))


def _stand_in(scaled: torch.Tensor, number: int) -> torch.Tensor:
    """Any smooth function of what the model is given."""
    return torch.tanh(0.8 * scaled + 0.1 * number) + 0.3 * scaled.roll(1, -1)


def _draws(program: Program, generator: torch.Generator) -> dict[int, torch.Tensor]:
    """By value, noise for the draws that the scheduler's steps read."""
    drawn = {source.id: source for source in program.needed_sources if source.kind == "noise"}
    read = [ref.id for mark in program.marks for event in program.events[mark.begin : mark.end] for ref in _read(event)]
    return {
        value: torch.randn(tuple(drawn[value].value.shape), generator=generator)
        for value in dict.fromkeys(read)
        if value in drawn
    }


def _read(event: Any) -> list[Ref]:
    return refs((event.args, event.kwargs))


def _replayed(
    program: Program, first: torch.Tensor, draws: Mapping[int, torch.Tensor], scales: Sequence[float]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the captured arithmetic would have the model given, and its result; `scales`: by evaluation, the factor from
    the scheduler's sample to what the model reads."""
    values, given = {program.marks[0].sample.id: first, **draws}, []
    with torch.no_grad():
        for mark, scale in zip(program.marks, scales, strict=True):
            given.append(values[mark.sample.id] * scale)
            values[mark.output.id] = _stand_in(given[-1], len(given))
            for place in range(mark.begin, mark.end):
                if place in program.needed:
                    run(program.events[place], values, {}, {})
    return given, values[program.marks[-1].result.id]


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
