"""Which point is next: Optuna's choice, from what is known of those that were tried.

Turn by turn TPE is asked for two things. One is the whole front, objective against distance (Ozaki et al., GECCO 2020);
the other is what the search is for, the least objective within the gate. Of the gate, distance tells before a trial
was judged: up to the distance that parts the judged ones best into those that hold and those that do not, it costs
nothing, and beyond that it counts.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from slipcast_compiler.search.levers import Point
from slipcast_compiler.search.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Params: TypeAlias = dict[str, Any]
Found: TypeAlias = dict[str, Any]

ATTEMPTS = 4  # of Optuna, to name a point that was not tried; then chance does
LAST_ATTEMPTS = 200  # beyond which what should be kept is not: there is no such point left
TOO_FAR = 4.0  # how steeply distance beyond the gate counts, against the logarithm of the objective


def propose(space: Space, known: Sequence[tuple[Params, Found]], keep: Point, seed: int) -> Params:
    """A point that is not among the `known`, in Optuna's terms; with the values to `keep`, if any, and then with
    nothing that is dear, as long as there is such a point. The caller asks only while there are points left."""
    import optuna

    if not known:
        return to_params(space, space.own)
    tried, random, terms = {key(params) for params, _ in known}, np.random.default_rng(seed), distributions(space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: BaseSampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=2 * len(space.dimensions))
        if keep:
            sampler = optuna.samplers.PartialFixedSampler(to_params(space, keep), sampler)
    study = optuna.create_study(directions=["minimize"] * len(values(known)[0]), sampler=sampler)
    for (before, _), value in zip(_sound(known), values(known), strict=True):
        study.add_trial(optuna.trial.create_trial(params=before, distributions=terms, values=value))
    for attempt in itertools.count():
        if attempt < ATTEMPTS:
            params: Params = study.ask(terms).params
        else:
            point = {name: each.values[random.integers(len(each.values))] for name, each in space.dimensions.items()}
            params = to_params(space, point | (keep if attempt < LAST_ATTEMPTS else {}))
        dear = keep and attempt < LAST_ATTEMPTS and space.is_dear(to_point(space, params))
        if key(params) not in tried and not dear:
            return params
    raise AssertionError("unreachable")


def values(known: Sequence[tuple[Params, Found]]) -> list[tuple[float, ...]]:
    """What is minimised, of the known points that could be measured: by turns the front, or what holds the gate."""
    sound = [found for _, found in _sound(known)]
    limit = parting_distance([found for found in sound if "holds" in found])
    if limit is None or len(known) % 2:
        return [(found["objective"], found["distance"]) for found in sound]
    return [
        (math.log(found["objective"]) + TOO_FAR * max(0.0, math.log(max(found["distance"], 1e-9) / limit)),)
        for found in sound
    ]


def parting_distance(judged: Sequence[Found]) -> float | None:
    """The distance up to which judged points are best said to hold the gate; None where none holds."""
    candidates = [found["distance"] for found in judged if found["holds"]]
    return min(
        candidates, key=lambda d: (sum(found["holds"] != (found["distance"] <= d) for found in judged), -d),
        default=None,
    )  # fmt: skip


def to_params(space: Space, point: Point) -> Params:
    """What Optuna calls values by: their places where they are ordered, else their names."""
    ordered = space.dimensions
    return {name: ordered[name].values.index(v) if ordered[name].ordered else v for name, v in point.items()}


def to_point(space: Space, params: Params) -> Point:
    """The other way."""
    return {
        name: each.values[params[name]] if each.ordered else params[name] for name, each in space.dimensions.items()
    }


def distributions(space: Space) -> dict[str, Any]:
    """Every dimension, as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    return {
        name: IntDistribution(0, len(each.values) - 1) if each.ordered else CategoricalDistribution(each.values)
        for name, each in space.dimensions.items()
    }


def key(params: Params) -> tuple[Any, ...]:
    """The same for the same point."""
    return tuple(sorted(params.items()))


def _sound(known: Sequence[tuple[Params, Found]]) -> list[tuple[Params, Found]]:
    return [(params, found) for params, found in known if "error" not in found]
