"""What pruning heads and pruning neurons share: which units stay, and the least-squares correction of what remains.

A unit is a group of columns of an output matrix W [out, in] whose inputs z have the second moment H = E[z z^T].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.errors import NumericalError, RecipeError
from slipcast_compiler.recipe.passes import PruneFFN, PruneHeads

Floats = npt.NDArray[np.float32]
DAMPING = 1e-4  # of the mean diagonal of H: directions that the samples hardly showed are not to be trusted


def reads_profile(options: PruneHeads | PruneFFN) -> bool:
    """Whether pruning reads the profile: for its criterion, or to correct what remains."""
    return options.ratio > 0 and (options.correct or options.criterion not in ("magnitude", "random"))


def select(
    scores: Mapping[str, Floats], ratio: float, floor: int, protect: Sequence[str], where: str
) -> dict[str, tuple[int, ...]]:
    """Units that stay, by layer: the lowest scores of all layers together go, but `floor` of each layer stay.

    Layers that match a pattern in `protect` keep all. RecipeError where the ratio cannot be reached, or none matches;
    NumericalError where scores are not finite.
    """
    if unknown := [pattern for pattern in protect if not any(fnmatchcase(name, pattern) for name in scores)]:
        raise RecipeError(f"{where}.protect: no layer matches", expected=", ".join(scores), got=", ".join(unknown))
    for name, units in scores.items():
        if not np.isfinite(units).all():
            raise NumericalError(
                f"{name}: the importance of its units is not finite", expected="finite numbers", got="NaN or infinity"
            )
    total = sum(map(len, scores.values()))
    wanted = budget = round(ratio * total)
    order = sorted(
        (float(score), name, unit) for name, units in scores.items() for unit, score in enumerate(units)
        if not any(fnmatchcase(name, pattern) for pattern in protect)
    )  # fmt: skip
    gone: dict[str, set[int]] = {name: set() for name in scores}
    for _, name, unit in order:
        if budget and len(scores[name]) - len(gone[name]) > floor:
            gone[name].add(unit)
            budget -= 1
    if budget:
        most = (wanted - budget) / total
        raise RecipeError(
            f"{where}.ratio cannot be reached", expected=f"at most {most:.2f} with these floors and protected layers",
            got=ratio,
        )  # fmt: skip
    return {name: tuple(unit for unit in range(len(scores[name])) if unit not in gone[name]) for name in scores}


def columns(units: Sequence[int], size: int) -> npt.NDArray[np.intp]:
    """The columns of units of `size` columns each."""
    return (np.asarray(units, np.intp)[:, None] * size + np.arange(size)).reshape(-1)


def corrected(weight: Floats, moment: Floats, kept: npt.NDArray[np.intp], layer: str) -> Floats:
    """The W' [out, kept] that comes nearest to W z from the kept inputs alone, in the mean square over the samples.

    W' = W H[:, K] H[K, K]^-1, as Optimal Brain Surgeon has it (Hassibi and Stork, 1993; SparseGPT, arXiv 2301.00774).
    """
    h = damped(moment)
    target = weight.astype(np.float64) @ h[:, kept]
    return _solve(h[np.ix_(kept, kept)], target.T, layer).T.astype(np.float32)


def removal_costs(weight: Floats, moment: Floats, size: int, layer: str) -> Floats:
    """What removing each unit costs when the rest is corrected after each: float32 [units], relative to E|W z|^2.

    Units go one after another, the cheapest first (group OBS), and the cost of one counts all that went before it, so
    that the order within a layer is kept by any threshold.
    """
    h = damped(moment)
    current, inverse = weight.astype(np.float64), _solve(h, np.eye(len(h)), layer)
    energy = float(np.einsum("oi,ij,oj->", current, h, current))
    remaining, spent = list(range(len(h) // size)), 0.0
    costs = np.zeros(len(remaining), np.float32)
    while remaining:
        blocks = {unit: columns([unit], size) for unit in remaining}
        prices = {}
        for unit, block in blocks.items():
            lost = current[:, block]
            prices[unit] = float(np.sum(lost * _solve(inverse[np.ix_(block, block)], lost.T, layer).T))
        unit = min(remaining, key=prices.__getitem__)
        spent += max(prices[unit], 0.0)
        costs[unit] = spent / max(energy, np.finfo(np.float64).tiny)
        remaining.remove(unit)
        block = blocks[unit]
        if remaining:
            move = _solve(inverse[np.ix_(block, block)], inverse[block], layer)
            current, inverse = current - current[:, block] @ move, inverse - inverse[:, block] @ move
            rest = columns(remaining, size)
            gone = np.setdiff1d(np.arange(len(h)), rest)
            current[:, gone] = 0
            inverse[gone], inverse[:, gone] = 0, 0
            inverse[gone, gone] = 1
    return costs


def damped(moment: Floats) -> npt.NDArray[np.float64]:
    """H with a little added to its diagonal, so that it can be inverted."""
    h = moment.astype(np.float64)
    extra = DAMPING * float(np.trace(h)) / len(h)
    return h + np.eye(len(h)) * (extra or 1.0)


def _solve(a: Any, b: Any, layer: str) -> npt.NDArray[np.float64]:
    try:
        found: npt.NDArray[np.float64] = np.linalg.solve(a, b)
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            f"{layer}: the correction of its weights cannot be solved", got=str(error),
            hint="profile with more prompts, or set correct = false",
        ) from error  # fmt: skip
    return found
