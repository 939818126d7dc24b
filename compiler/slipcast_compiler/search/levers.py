"""What a search may turn: LEVERS, each a few values and the overrides of the recipe that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from slipcast.bundle.sampling import Sampling
from slipcast.engines import ENGINES
from slipcast.sampling.samplers import SAMPLERS, base_name, find_sampler
from slipcast_compiler.recipe.search import SHARE
from slipcast_compiler.search.subject import Facts, Overrides, measured_table, measured_target

Point: TypeAlias = dict[str, Any]  # dimension -> value

STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50)
FEWEST_STEPS = 3  # of a checkpoint that is not distilled to few
SCHEDULES = ("leading", "linspace", "trailing", "karras", "ays_sd15")
FLOW_SCHEDULES = ("flow", "flow_uniform", "karras")
FOUND = ("dp", "direct")  # methods of [timesteps]
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
    """`dimensions(facts)`: what it turns, by name; empty where the recipe or its checkpoint has no use for it.
    `overrides(facts, values)`: what values other than the recipe's stand for. `engine`: whether it decides the engine,
    and so memory."""

    dimensions: Callable[[Facts], dict[str, Dimension]]
    overrides: Callable[[Facts, Point], Overrides]
    engine: bool = False


def _ordered(own: Any, values: tuple[Any, ...]) -> Dimension:
    return Dimension(tuple(sorted({*values, own})), own)


def _named(own: str, values: tuple[str, ...], dear: tuple[str, ...] = ()) -> Dimension:
    return Dimension(tuple(dict.fromkeys((own, *values))), own, ordered=False, dear=dear)


def _of_steps(
    dimensions: Callable[[Facts, Sampling, Sampling], dict[str, Dimension]],
) -> Callable[[Facts], dict[str, Dimension]]:
    """`dimensions(facts, sampling, reference)`, where slipcast's samplers take the steps."""

    def found(facts: Facts) -> dict[str, Dimension]:
        return dimensions(facts, facts.sampling, facts.reference) if facts.sampling and facts.reference else {}

    return found


@_of_steps
def _samplers(facts: Facts, sampling: Sampling, reference: Sampling) -> dict[str, Dimension]:
    """Those whose trajectory can come near to another's: without noise of their own, one evaluation a step."""
    if facts.few_step or sampling.eta:
        return {}
    fitting = {name: each for name, each in SAMPLERS.items() if each.flow or not sampling.noise.is_flow}
    alike = (name for name, each in fitting.items() if not each.stochastic and each.evaluations == 1)
    return {"sampler": _named(base_name(sampling.sampler), tuple(alike))}


@_of_steps
def _steps(facts: Facts, sampling: Sampling, reference: Sampling) -> dict[str, Dimension]:
    if sampling.schedule is None:
        return {}
    own, most = sampling.steps, max(sampling.steps, reference.steps)
    fewest = 1 if facts.few_step else min(FEWEST_STEPS, own)
    return {"steps": _ordered(own, tuple(n for n in STEPS if fewest <= n <= most))}


@_of_steps
def _timesteps(facts: Facts, sampling: Sampling, reference: Sampling) -> dict[str, Dimension]:
    """Named schedules, and lists that are found; a recipe with [timesteps] keeps to the latter."""
    if facts.few_step or sampling.schedule is None:
        return {}
    if facts.recipe.timesteps:
        return {"timesteps": _named(facts.recipe.timesteps.method, FOUND, dear=FOUND)}
    names = FLOW_SCHEDULES if sampling.noise.is_flow else SCHEDULES
    found = () if find_sampler(sampling.sampler).stochastic or sampling.eta else FOUND
    return {"timesteps": _named(sampling.schedule, (*names, *found), dear=FOUND)}


@_of_steps
def _interval(facts: Facts, sampling: Sampling, reference: Sampling) -> dict[str, Dimension]:
    """Ends at noise levels of the reference's schedule, so that each leaves out some of the steps."""
    if sampling.guidance_scale <= 1 or not facts.guided:
        return {}
    sigmas = reference.lay().sigmas
    if reference.noise.prediction == "flow_ratio":  # intervals of flow matching are of times
        sigmas = tuple(sigma / (1 + sigma) for sigma in sigmas)
    levels = [float(f"{sigma:.2g}") for sigma in sigmas if sigma > 0]
    whole = float(f"{levels[0] * 1.1:.2g}")
    low, high = facts.recipe.sampling.guidance_interval or (0.0, whole)
    third = max(1, len(levels) // 3)
    lows, highs = (0.0, *levels[third :: max(1, len(levels) // 8)]), (*levels[1:third], whole)
    return {"guidance_low": _ordered(low, lows), "guidance_high": _ordered(high, highs)}


@_of_steps
def _caching(facts: Facts, sampling: Sampling, reference: Sampling) -> dict[str, Dimension]:
    """Whether about half of the steps are shallow, by a mask that is found for each point. It takes memory. What a
    recipe says of it goes for all points."""
    if facts.recipe.caching:
        return {"caching": Dimension((True,), True, ordered=False)}
    several = find_sampler(sampling.sampler).evaluations > 1
    fewer = facts.search.objective == "memory"
    if fewer or not facts.cacheable or facts.few_step or facts.recipe.passes.quantize or several or sampling.steps < 2:
        return {}
    return {"caching": Dimension((False, True), False, ordered=False, dear=(True,))}


def _rewrites(lever: str, facts: Facts) -> bool:
    """Whether its pass finds something to do, and enough to choose by."""
    return lever in facts.rewritable and (facts.prompts is None or facts.prompts >= MIN_CALIBRATION)


def _pruned(name: str) -> Callable[[Facts], dict[str, Dimension]]:
    def dimensions(facts: Facts) -> dict[str, Dimension]:
        if not _rewrites(name, facts):
            return {}
        options = getattr(facts.recipe.passes, f"prune_{name}")
        return {name: _ordered(options.ratio if options else 0.0, RATIOS)}

    return dimensions


def _low_rank(facts: Facts) -> dict[str, Dimension]:
    if not _rewrites("low_rank", facts):
        return {}
    options = facts.recipe.passes.low_rank
    return {"energy": _ordered(options.energy if options else 1.0, ENERGIES)}


def _precision(facts: Facts) -> dict[str, Dimension]:
    """Of the target that is measured: its own and those with fewer bits, of which int8 gains with large models alone. A
    recipe in int8 or int4 stays so: its table of [passes] is for no other."""
    targets, own = facts.recipe.targets, measured_table(facts.recipe)
    taken = {target.precision for target in targets if target is not own and target.engine == own.engine}
    fewer = {"fp32": ("bf16", "fp16", "int8"), "int8": (), "int4": ()}.get(own.precision, ("int8",))
    gains = facts.denoiser_parameters >= LARGE and not facts.recipe.adapters
    offered = set(ENGINES[own.engine].precisions) - taken - (set() if gains else {"int8"})
    found = tuple(name for name in fewer if name in offered)
    return {"precision": _named(own.precision, found)} if found else {}


def _to_precision(facts: Facts, values: Point) -> Overrides:
    chosen = {f"targets.{measured_target(facts.recipe)}.precision": values["precision"]}
    return chosen | ({"passes.quantize.samples": 32} if values["precision"] == "int8" else {})


def _to_timesteps(facts: Facts, values: Point) -> Overrides:
    chosen = values["timesteps"]
    return {"timesteps.method" if chosen in FOUND else "sampling.schedule": chosen}


# A new lever is a line here, and its name in recipe/search.py.
LEVERS: dict[str, Lever] = {
    "sampler": Lever(_samplers, lambda facts, at: {"sampling.sampler": at["sampler"]}),
    "steps": Lever(_steps, lambda facts, at: {"sampling.steps": at["steps"]}),
    "timesteps": Lever(_timesteps, _to_timesteps),
    "guidance_interval": Lever(
        _interval, lambda facts, at: {"sampling.guidance_interval": [at["guidance_low"], at["guidance_high"]]}
    ),
    "caching": Lever(_caching, lambda facts, at: {"caching.share": SHARE}, engine=True),
    "heads": Lever(_pruned("heads"), lambda facts, at: {"passes.prune_heads.ratio": at["heads"]}, engine=True),
    "ffn": Lever(_pruned("ffn"), lambda facts, at: {"passes.prune_ffn.ratio": at["ffn"]}, engine=True),
    "low_rank": Lever(_low_rank, lambda facts, at: {"passes.low_rank.energy": at["energy"]}, engine=True),
    "precision": Lever(_precision, _to_precision, engine=True),
}
