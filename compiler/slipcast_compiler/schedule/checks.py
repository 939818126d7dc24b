"""What a schedule leaves for [early_exit], [timesteps] and [caching] to do: RecipeError where that is nothing.

`few_step`: the sampler of a checkpoint that was distilled to few steps; None of others.
"""

from __future__ import annotations

from slipcast.bundle.sampling import Sampling
from slipcast.errors import RecipeError
from slipcast.sampling.samplers import SAMPLERS, find_sampler
from slipcast_compiler.model.scheduler import FILE
from slipcast_compiler.recipe.sampling import CachingTable, TimestepsTable

LEAST_TO_EXIT = 3


def check_early_exit(sampling: Sampling, few_step: str | None) -> None:
    """Whether an image can stop before its last step."""
    if few_step:
        raise RecipeError(
            "[early_exit]: the checkpoint seems to be distilled to few steps, and takes all of them",
            expected="no [early_exit]",
            got=f"a scheduler for {few_step}",
        )
    if sampling.noise.keeps_noise:
        raise RecipeError(
            "[early_exit]: DDIM goes on with the noise of what was not clipped, and has no clean picture to stop at",
            expected="no [early_exit], or another sampler",
            got=f"clip_sample in {FILE}",
        )
    if sampling.steps < LEAST_TO_EXIT:
        raise RecipeError(
            f"[early_exit]: of {sampling.steps} steps none can be left out: a change is seen after the second",
            expected=f"sampling.steps of {LEAST_TO_EXIT} or more, or no [early_exit]",
            got=sampling.steps,
        )


def check_timesteps(table: TimestepsTable, sampling: Sampling, few_step: str | None) -> None:
    """Whether noise levels can be found against a finer trajectory."""
    if few_step:
        raise RecipeError(
            "[timesteps]: the checkpoint seems to be distilled to few steps, and knows no other timesteps",
            expected="no [timesteps]",
            got=f"a scheduler for {few_step}",
        )
    sampler = find_sampler(sampling.sampler)
    if sampler.stochastic or sampling.eta:
        known = ", ".join(name for name, each in SAMPLERS.items() if not each.stochastic)
        raise RecipeError(
            f"[timesteps]: {sampling.sampler} draws noise, so it has no trajectory to come near to",
            expected=f"{known}, without eta",
            got=sampling.sampler,
        )
    if sampler.evaluations > 1 and not sampler.flow:  # dpm2; Heun's second evaluation is at a level of the list
        raise RecipeError(
            f"[timesteps]: {sampling.sampler} evaluates between its levels, where the fine trajectory is not known",
            expected="another sampler",
            got=sampling.sampler,
        )
    if not sampling.schedule:
        raise RecipeError(
            "[timesteps]: its noise levels follow no schedule that slipcast has, so that there are no finer ones",
            expected="sampling.schedule, or no [timesteps]",
            got="a list",
        )
    if table.fine_steps <= sampling.steps:
        raise RecipeError(
            "timesteps.fine_steps is no finer",
            expected=f"more than sampling.steps = {sampling.steps}",
            got=table.fine_steps,
        )


def check_caching(table: CachingTable, sampling: Sampling) -> None:
    """Whether a step can be a shallow one, and a mask of steps says which evaluations are."""
    if find_sampler(sampling.sampler).evaluations > 1 or sampling.sampler == "pndm":  # which begins with one more
        raise RecipeError(
            f"[caching]: {sampling.sampler} evaluates the denoiser more often than once a step",
            expected="another sampler",
            got=sampling.sampler,
        )
    if table.full_of(sampling.steps) >= sampling.steps:
        raise RecipeError(
            "caching.full_steps: no step is left that could be shallow",
            expected=f"fewer than sampling.steps = {sampling.steps}",
            got=table.full_of(sampling.steps),
        )
