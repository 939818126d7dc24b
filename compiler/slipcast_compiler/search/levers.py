"""What a search may turn: LEVERS, each a few values and the overrides of the recipe that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from slipcast.engines import ENGINES
from slipcast.sampling.samplers import SAMPLERS, base_name, find_sampler
from slipcast_compiler.plan import Plan

Overrides: TypeAlias = dict[str, Any]
Point: TypeAlias = dict[str, Any]  # dimension -> value

STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50)
FEWEST_STEPS = 3  # of a checkpoint that is not distilled to few
SCHEDULES = ("leading", "linspace", "trailing", "karras", "ays_sd15")
FLOW_SCHEDULES = ("flow", "flow_uniform", "karras")
FOUND = ("dp", "direct")  # methods of [timesteps]
SHARE = 0.2  # of the denoiser that a shallow one is, with feature caching
RATIOS = (0.0, 0.15, 0.3, 0.45, 0.6)
ENERGIES = (0.99, 0.999, 1.0)
LARGE = 100_000_000  # parameters of a denoiser: Stable Diffusion 1.5 gains by int8, the reference model does not
MIN_CALIBRATION = 4  # prompts, below which a profile is not chosen by; see profile.MIN_SAMPLES


@dataclass(frozen=True)
class Dimension:
    """Values of one parameter and the recipe's own among them; `ordered` where neighbours are alike. `dear`: values
    for which every point takes a stage of its own, and not just another run."""

    values: tuple[Any, ...]
    own: Any
    ordered: bool = True
    dear: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Lever:
    """`dimensions(plan)`: what it turns, by name; empty where the recipe or its checkpoint has no use for it.
    `overrides(plan, values)`: what values other than the recipe's stand for. `engine`: whether it decides the engine,
    and so memory."""

    dimensions: Callable[[Plan], dict[str, Dimension]]
    overrides: Callable[[Plan, Point], Overrides]
    engine: bool = False


def _ordered(own: Any, values: tuple[Any, ...]) -> Dimension:
    return Dimension(tuple(sorted({*values, own})), own)


def _named(own: str, values: tuple[str, ...], dear: tuple[str, ...] = ()) -> Dimension:
    return Dimension(tuple(dict.fromkeys((own, *values))), own, ordered=False, dear=dear)


def _is_flow(plan: Plan) -> bool:
    return plan.checkpoint.process.prediction == "flow"


def _few(plan: Plan) -> bool:
    return plan.checkpoint.few_step_sampler is not None


def _cannot_profile(plan: Plan) -> bool:
    return plan.family is not None and len(plan.family.calibration) < MIN_CALIBRATION


def _samplers(plan: Plan) -> dict[str, Dimension]:
    """Those whose trajectory can come near to another's: without noise of their own, one evaluation a step."""
    if _few(plan) or plan.sampling.eta:
        return {}
    fitting = {name: each for name, each in SAMPLERS.items() if each.flow or not _is_flow(plan)}
    alike = (name for name, each in fitting.items() if not each.stochastic and each.evaluations == 1)
    return {"sampler": _named(base_name(plan.sampling.sampler), tuple(alike))}


def _steps(plan: Plan) -> dict[str, Dimension]:
    if plan.sampling.schedule is None:
        return {}
    own, most = plan.sampling.steps, max(plan.sampling.steps, plan.reference.steps)
    fewest = 1 if _few(plan) else min(FEWEST_STEPS, own)
    return {"steps": _ordered(own, tuple(n for n in STEPS if fewest <= n <= most))}


def _timesteps(plan: Plan) -> dict[str, Dimension]:
    """Named schedules, and lists that are found; a recipe with [timesteps] keeps to the latter."""
    if _few(plan) or plan.sampling.schedule is None:
        return {}
    if plan.recipe.timesteps:
        return {"timesteps": _named(plan.recipe.timesteps.method, FOUND, dear=FOUND)}
    names = FLOW_SCHEDULES if _is_flow(plan) else SCHEDULES
    found = () if find_sampler(plan.sampling.sampler).stochastic or plan.sampling.eta else FOUND
    return {"timesteps": _named(plan.sampling.schedule, (*names, *found), dear=FOUND)}


def _interval(plan: Plan) -> dict[str, Dimension]:
    """Ends at noise levels of the reference's schedule, so that each leaves out some of the steps."""
    if plan.sampling.guidance_scale <= 1 or plan.family is None:
        return {}
    sigmas = plan.reference.lay().sigmas
    levels = [float(f"{sigma:.2g}") for sigma in sigmas if sigma > 0]
    whole = float(f"{levels[0] * 1.1:.2g}")
    low, high = plan.sampling.guidance_interval or (0.0, whole)
    third = max(1, len(levels) // 3)
    lows, highs = (0.0, *levels[third :: max(1, len(levels) // 8)]), (*levels[1:third], whole)
    return {"guidance_low": _ordered(low, lows), "guidance_high": _ordered(high, highs)}


def _caching(plan: Plan) -> dict[str, Dimension]:
    """Whether about half of the steps are shallow, by a mask that is found for each point. It takes memory. What a
    recipe says of it goes for all points."""
    sampler, search = find_sampler(plan.sampling.sampler), plan.recipe.search
    fewer = search and search.objective == "memory"
    if plan.recipe.caching:
        return {"caching": Dimension((True,), True, ordered=False)}
    if fewer or _few(plan) or plan.recipe.passes.quantize or sampler.evaluations > 1 or plan.sampling.steps < 2:
        return {}
    return {"caching": Dimension((False, True), False, ordered=False, dear=(True,))}


def _pruned(name: str) -> Callable[[Plan], dict[str, Dimension]]:
    def dimensions(plan: Plan) -> dict[str, Dimension]:
        if _cannot_profile(plan):
            return {}
        options = getattr(plan.recipe.passes, f"prune_{name}")
        return {name: _ordered(options.ratio if options else 0.0, RATIOS)}

    return dimensions


def _low_rank(plan: Plan) -> dict[str, Dimension]:
    if _cannot_profile(plan):
        return {}
    options = plan.recipe.passes.low_rank
    return {"energy": _ordered(options.energy if options else 1.0, ENERGIES)}


def _precision(plan: Plan) -> dict[str, Dimension]:
    """Of the target that is measured: its own and those with fewer bits, of which int8 gains with large models alone. A
    recipe in int8 or int4 stays so: its table of [passes] is for no other."""
    targets, place = plan.recipe.targets, measured_target(plan)
    own = targets[place]
    taken = {target.precision for target in targets if target is not own and target.engine == own.engine}
    fewer = {"fp32": ("bf16", "fp16", "int8"), "int8": (), "int4": ()}.get(own.precision, ("int8",))
    offered = set(ENGINES[own.engine].precisions) - taken - (set() if _is_large(plan) else {"int8"})
    found = tuple(name for name in fewer if name in offered)
    return {"precision": _named(own.precision, found)} if found else {}


def _is_large(plan: Plan) -> bool:
    weights = plan.checkpoint.weights(plan.checkpoint.architecture.components["denoiser"].folder)
    return sum(math.prod(weight.entry.shape) for weight in weights.values()) >= LARGE


def _to_precision(plan: Plan, values: Point) -> Overrides:
    chosen = {f"targets.{measured_target(plan)}.precision": values["precision"]}
    return chosen | ({"passes.quantize.samples": 32} if values["precision"] == "int8" else {})


def _to_timesteps(plan: Plan, values: Point) -> Overrides:
    chosen = values["timesteps"]
    return {"timesteps.method" if chosen in FOUND else "sampling.schedule": chosen}


# A new lever is a line here, and its name in recipe/search.py.
LEVERS: dict[str, Lever] = {
    "sampler": Lever(_samplers, lambda plan, at: {"sampling.sampler": at["sampler"]}),
    "steps": Lever(_steps, lambda plan, at: {"sampling.steps": at["steps"]}),
    "timesteps": Lever(_timesteps, _to_timesteps),
    "guidance_interval": Lever(
        _interval, lambda plan, at: {"sampling.guidance_interval": [at["guidance_low"], at["guidance_high"]]}
    ),
    "caching": Lever(_caching, lambda plan, at: {"caching.share": SHARE}, engine=True),
    "heads": Lever(_pruned("heads"), lambda plan, at: {"passes.prune_heads.ratio": at["heads"]}, engine=True),
    "ffn": Lever(_pruned("ffn"), lambda plan, at: {"passes.prune_ffn.ratio": at["ffn"]}, engine=True),
    "low_rank": Lever(_low_rank, lambda plan, at: {"passes.low_rank.energy": at["energy"]}, engine=True),
    "precision": Lever(_precision, _to_precision, engine=True),
}


def measured_target(plan: Plan) -> int:
    """The place, among the recipe's targets, of the first that can run here."""
    return next(i for i, target in enumerate(plan.recipe.targets) if ENGINES[target.engine].available())
