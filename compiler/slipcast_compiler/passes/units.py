"""What pruning heads and pruning neurons share: which units stay, and the least-squares correction of what remains.

A unit is a group of columns of one or more output matrices W [out, in] whose inputs z have the second moment
H = E[z z^T]. Joint attention has an output for each stream: a head goes from both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from slipcast.errors import NumericalError, RecipeError
from slipcast_compiler.recipe.passes import PruneFFN, PruneHeads

if TYPE_CHECKING:
    from slipcast_compiler.model.units import AttentionLayer, FeedForwardLayer, Slice
    from slipcast_compiler.profile.profile import Profile

    Layer = AttentionLayer | FeedForwardLayer

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


def removal_costs(outputs: Sequence[tuple[Floats, Floats, int]], layer: str) -> Floats:
    """What removing each unit costs when the rest is corrected after each: float32 [units], relative to E|W z|^2.

    `outputs`: (W, H, columns of each unit) of every output that units have columns of; costs are sums over them. Units
    go one after another, the cheapest first (group OBS), and the cost of one counts all that went before it, so that
    the order within a layer is kept by any threshold.
    """
    left = [_Remaining(*output, layer) for output in outputs]
    energy, spent = sum(output.energy for output in left), 0.0
    remaining = list(range(left[0].units))
    costs = np.zeros(len(remaining), np.float32)
    while remaining:
        prices = {unit: sum(output.price(unit) for output in left) for unit in remaining}
        unit = min(remaining, key=prices.__getitem__)
        spent += max(prices[unit], 0.0)
        costs[unit] = spent / max(energy, np.finfo(np.float64).tiny)
        remaining.remove(unit)
        if remaining:
            for output in left:
                output.remove(unit, remaining)
    return costs


class _Remaining:
    """An output matrix, corrected for every unit that has gone."""

    def __init__(self, weight: Floats, moment: Floats, size: int, layer: str) -> None:
        h = damped(moment)
        self._size, self._layer, self.units = size, layer, len(h) // size
        self._current, self._inverse = weight.astype(np.float64), _solve(h, np.eye(len(h)), layer)
        self.energy = float(np.einsum("oi,ij,oj->", self._current, h, self._current))

    def price(self, unit: int) -> float:
        block = columns([unit], self._size)
        lost = self._current[:, block]
        return float(np.sum(lost * _solve(self._inverse[np.ix_(block, block)], lost.T, self._layer).T))

    def remove(self, unit: int, remaining: Sequence[int]) -> None:
        block, inverse = columns([unit], self._size), self._inverse
        move = _solve(inverse[np.ix_(block, block)], inverse[block], self._layer)
        self._current = self._current - self._current[:, block] @ move
        self._inverse = inverse - inverse[:, block] @ move
        gone = np.setdiff1d(np.arange(len(inverse)), columns(remaining, self._size))
        self._current[:, gone] = 0
        self._inverse[gone], self._inverse[:, gone] = 0, 0
        self._inverse[gone, gone] = 1


def moment_of(measured: Profile, layer: Layer, place: Slice) -> Floats:
    """The second moment of those inputs of a linear layer that units of `layer` are.

    Heads are the first inputs and neurons the last, so that either is found where a pass has removed of the other.
    """
    moment, count = measured.second_moment(place.linear), layer.units * place.size
    return moment[-count:, -count:] if place.start else moment[:count, :count]


class Weights(Protocol):
    """What a Denoiser says of parameters, which others may say too."""

    def weight(self, name: str) -> Floats: ...
    def has(self, name: str) -> bool: ...


def matrix(denoiser: Weights, linear: str) -> Floats:
    """The weight of a linear layer or of a 1x1 convolution, [out, in]."""
    weight = denoiser.weight(f"{linear}.weight")
    return weight.reshape(weight.shape[0], -1)


def keep_units(denoiser: Weights, layer: Layer, kept: Sequence[int], measured: Profile | None) -> dict[str, Floats]:
    """The layer's parameters with these units alone; corrected by the second moments of `measured`, where given."""
    gone = [unit for unit in range(layer.units) if unit not in set(kept)]
    tensors: dict[str, Floats] = {}
    for linear in dict.fromkeys(place.linear for place in layer.rows):
        removed = np.concatenate([place.places(gone) for place in layer.rows if place.linear == linear])
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if denoiser.has(name):
                tensors[name] = np.delete(denoiser.weight(name), removed, axis=0)
    for place in layer.columns:
        weight, chosen = matrix(denoiser, place.linear), columns(kept, place.size)
        first, end = place.start, place.start + layer.units * place.size
        own = weight[:, first:end]
        narrowed = own[:, chosen] if measured is None else (
            corrected(own, moment_of(measured, layer, place), chosen, layer.name)
        )  # fmt: skip
        whole = np.concatenate([weight[:, :first], narrowed, weight[:, end:]], axis=1)
        tail = denoiser.weight(f"{place.linear}.weight").shape[2:]
        tensors[f"{place.linear}.weight"] = whole.reshape(*whole.shape, *tail)
    return tensors


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
