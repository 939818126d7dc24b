"""[search] in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slipcast.bundle.validation import Strict
from slipcast_compiler.recipe.values import AsTuple

LEVERS = (
    "sampler",
    "steps",
    "timesteps",
    "guidance_interval",
    "caching",
    "heads",
    "ffn",
    "low_rank",
    "precision",
)  # what each is: search/levers.py
PROFILED = frozenset({"heads", "ffn", "low_rank"})  # whose passes read the profile
SHARE = 0.2  # of the denoiser that a shallow one is, with feature caching


class SearchTable(Strict):
    """[search]: the recipe is the first trial, and what is best of all that were tried is compiled.

    `objective`: what shall be least among the points that hold the gate with a margin on calibration prompts. `levers`:
    what may be turned, beside which the recipe stays as it is; without, all that apply. `budget_minutes` is for trials,
    all runs of the same search together, and can be raised to go on.
    """

    objective: Literal["latency", "memory"] = "latency"
    budget_minutes: Annotated[float, Field(gt=0)] = 10.0
    levers: Annotated[
        tuple[Literal[LEVERS], ...],  # type: ignore[valid-type]
        AsTuple,
    ] = ()
    # of the sampler that proposes points
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
