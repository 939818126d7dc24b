"""Another sampler, schedule or number of steps than the pipeline's own, as a recipe asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slipcast.bundle.sampling import Sampling
from slipcast.errors import RecipeError
from slipcast.sampling.samplers import base_name, find_sampler
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.labels import kind_of
from slipcast_compiler.capture.loop import START, Loop
from slipcast_compiler.model.scheduler import read_process, with_options
from slipcast_compiler.recipe.sampling import ReferenceTable, SamplingTable

ELSEWHERE = ("width", "height", "guidance_rescale", "guidance_reuse")


def samplings_of(variants: Sequence[Found], asked: SamplingTable | None, scheduler: Any) -> tuple[Sampling, ...]:
    """By variant, where a recipe asks for any; RecipeError where it asks for what cannot be."""
    if not asked:
        return ()
    for name in ELSEWHERE:
        if getattr(asked, name):
            raise RecipeError(
                f"sampling.{name} is not for a captured pipeline yet",
                expected="none",
                got=getattr(asked, name),
                hint="what the pipeline is called with goes under [call], by the names of its own arguments",
            )
    return tuple(_sampling_of(variant, asked, scheduler) for variant in variants)


def _sampling_of(variant: Found, asked: SamplingTable, scheduler: Any) -> Sampling:
    if not (loop := variant.loop):
        raise RecipeError(
            f"[sampling] is not for this pipeline: {variant.why_not}",
            expected="steps that slipcast's samplers take",
            got="the scheduler's own",
            hint="call.num_inference_steps = N is for the pipeline's own steps",
        )
    if asked.guidance_scale is not None and (not loop.guidance or asked.guidance_scale <= 1):
        raise RecipeError(
            "sampling.guidance_scale: without guidance, or with it, is another program than the one that was captured",
            expected="more than 1" if loop.guidance else "none, or guidance under [call]",
            got=asked.guidance_scale,
        )
    made = resample(loop.sampling, scheduler, asked)
    _check_start(loop, made)
    return _in_interval(loop, made, asked.guidance_interval)


def _in_interval(loop: Loop, made: Sampling, interval: Sequence[float] | None) -> Sampling:
    """With guidance at these noise levels alone, if it is asked for."""
    if not interval:
        return made
    if not loop.unguided:
        raise RecipeError(
            f"sampling.guidance_interval is not for this pipeline: {loop.why_guided}",
            expected="guidance whose branches can be told apart", got=list(interval),
        )  # fmt: skip
    made = with_interval(made, interval)
    if not parts_steps(made):
        levels = list(made.lay().sigmas[:-1])
        if made.noise.prediction == "flow_ratio":
            levels = [level / (1 + level) for level in levels]
        raise RecipeError(
            "sampling.guidance_interval leaves out none of the steps, or all of them",
            expected=f"noise levels between {levels[-1]:g} and {levels[0]:g}", got=list(interval),
            hint="leave it out, or guidance under [call]",
        )  # fmt: skip
    return made


def with_interval(sampling: Sampling, interval: Sequence[float]) -> Sampling:
    """With guidance at these noise levels alone: of flow matching times from 0 to 1, whatever its sampler has."""
    ends = tuple(map(_ratio, interval)) if sampling.noise.prediction == "flow_ratio" else tuple(interval)
    return Sampling.model_validate({**dict(sampling), "guidance_interval": ends})


def _ratio(time: float) -> float:
    """Noise over signal at a time of flow matching; from its end on, more than any."""
    return time / (1 - time) if time < 1 else 1e9


def parts_steps(sampling: Sampling) -> bool:
    """Whether there is guidance at some of the schedule's noise levels, and none at others."""
    guidance = sampling.guidance()
    return len({guidance.applies(sigma) for sigma in sampling.lay().sigmas[:-1]}) == 2


def resample(sampling: Sampling, scheduler: Any, asked: ReferenceTable) -> Sampling:
    """The same with what a recipe asks for in its place; RecipeError where the checkpoint's scheduler forbids it."""
    base = asked.sampler or base_name(sampling.sampler)
    process, sampler = sampling.noise, sampling.sampler
    if asked.sampler and process.is_flow:
        own = find_sampler(base).flow  # of its own coordinates, or noise over signal
        process, sampler = replace(process, prediction="flow" if own else "flow_ratio"), base
    elif asked.sampler:
        config = {**dict(scheduler.config), "_class_name": type(scheduler).__name__}
        process, sampler = read_process(config, base, prompted=False), with_options(config, base)
    explicit = asked.timesteps or (asked.sigmas and asked.sigmas[:-1])
    given = {
        "sampler": sampler,
        "noise": process,
        "schedule": None if explicit else asked.schedule or sampling.schedule,
        "timesteps": asked.timesteps,
        "sigmas": asked.sigmas if explicit or asked.schedule or asked.steps else sampling.sigmas,
        "steps": len(explicit) if explicit else asked.steps or sampling.steps,
        "guidance_scale": sampling.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        "eta": asked.eta or 0.0,
    }
    made = Sampling.model_validate({**dict(sampling), **given})
    made.lay()
    return made


def _check_start(loop: Loop, made: Sampling) -> None:
    """RecipeError where noise would begin at another level than the pipeline scales it to."""
    before, after = loop.sampling.lay().sigmas[0], made.lay().sigmas[0]
    if (
        loop.vp
        or loop.sampling.noise.is_flow
        or any(kind_of(name) == START and any(columns) for name, columns in loop.columns.items())
        or before == after
    ):
        return
    raise RecipeError(
        "[sampling] begins at another noise level than the pipeline's own schedule, to which its noise is scaled",
        expected=f"sigma {before:g} first",
        got=f"{after:g}",
        hint="another schedule, such as karras in place of trailing",
    )
