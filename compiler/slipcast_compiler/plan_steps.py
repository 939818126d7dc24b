"""The steps of a captured pipeline, and what a recipe may ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slipcast.bundle.sampling import Sampling
from slipcast.errors import RecipeError
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.resampling import samplings_of
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.schedule.checks import check_caching, check_early_exit, check_timesteps

OF_THE_LOOP = ("timesteps", "caching", "early_exit")  # tables that are for steps which slipcast's samplers take


@dataclass(frozen=True)
class Steps:
    """Of each variant, and the pipeline's `scheduler`; `few_step`: the sampler of a checkpoint that is distilled to few
    steps."""

    variants: tuple[Found, ...]
    scheduler: Any
    few_step: str | None

    @property
    def own(self) -> Sampling | None:
        """The pipeline's own, of the default variant; None where slipcast's samplers do not take its steps."""
        loop = self.variants[0].loop
        return loop.sampling if loop else None

    def samplings(self, recipe: Recipe) -> tuple[Sampling, ...]:
        """By variant, what a recipe asks for in place of the pipeline's own, if it does; RecipeError for what cannot
        be."""
        asked = recipe.sampling if "sampling" in recipe.model_fields_set else None
        samplings = samplings_of(self.variants, asked, self.scheduler)
        _check(recipe, self, samplings)
        return samplings


def _check(recipe: Recipe, steps: Steps, samplings: Sequence[Sampling]) -> None:
    """RecipeError where a table asks for something of steps that others take, or where it has nothing to do."""
    variants, few_step = steps.variants, steps.few_step
    asked = [name for name in OF_THE_LOOP if getattr(recipe, name)]
    loops = [found.loop for found in variants if found.loop]
    if asked and len(loops) < len(variants):
        raise RecipeError(
            f"[{asked[0]}] is not for this pipeline: {variants[0].why_not}",
            expected="steps that slipcast's samplers take",
            got="the scheduler's own",
            hint=f"leave [{asked[0]}] out",
        )
    chosen = samplings or [loop.sampling for loop in loops]
    for found, sampling in zip(variants, chosen, strict=False):
        if recipe.timesteps:
            check_timesteps(recipe.timesteps, sampling, few_step)
            _check_finer(found, sampling, recipe.timesteps.fine_steps)
        for name in ("timesteps", "caching", "adapters") if sampling.guidance_interval else ():
            if getattr(recipe, name):
                raise RecipeError(
                    f"[{name}] does not go with sampling.guidance_interval in a captured pipeline",
                    expected="one of the two", got=name,
                )  # fmt: skip
        if recipe.caching:
            check_caching(recipe.caching, sampling)
        if recipe.early_exit:
            check_early_exit(sampling, few_step)
    if recipe.caching and len(variants) > 1:
        raise RecipeError(
            "[caching] is for one combination of what call lists, as each may have a denoiser of its own",
            expected="no lists under [call], or no [caching]",
            got=f"{len(variants)} combinations",
        )
    if recipe.timesteps and any(each.noise != chosen[0].noise for each in chosen):
        raise RecipeError(
            "[timesteps]: what call lists have noise levels of their own",
            expected="one size, or no [timesteps]",
            got=f"{len(chosen)} combinations",
        )


def _check_finer(found: Found, sampling: Sampling, fine_steps: int) -> None:
    """RecipeError where more steps begin at another noise level than the one to which the pipeline scales its noise."""
    assert found.loop
    own, finer = sampling.lay().sigmas[0], sampling.lay(fine_steps).sigmas[0]
    if own != finer and not found.loop.vp:
        raise RecipeError(
            f"[timesteps]: {fine_steps} steps begin at another noise level than the one to which its noise is scaled",
            expected=f"sigma {own:g} first",
            got=f"{finer:g}",
            hint="sampling.schedule: another one, such as linspace or karras",
        )
