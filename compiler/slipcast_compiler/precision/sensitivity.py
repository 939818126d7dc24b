"""Which layers of a quantised graph to keep in higher precision, by how far it is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slipcast.progress import Advance

Group = tuple[str, ...]  # layers that are neighbours in the graph

JUDGED, RANKED = 8, 4  # samples that the error is measured on, and that layers are ranked by


@dataclass(frozen=True)
class Found:
    """`tried`: the groups that were quantised alone, as (first layer, how many from it on, error), where they had to
    be measured; `error_all`: of all of them together."""

    quantised: frozenset[str]
    kept: tuple[str, ...]
    error: float
    error_all: float
    tried: tuple[tuple[str, int, float], ...] = ()


def search(
    layers: Sequence[str], error: Callable[[frozenset[str], int], float], limit: float, budget: int, advance: Advance
) -> Found:
    """Quantise as many layers as `limit` allows. `error(layers, samples)` measures a choice of them.

    Errors are taken to add up as independent noise does, in squares. So the layers that are worst alone are kept until
    what is left adds up to the limit; as it never quite does, the sum is scaled by what was measured and more are kept,
    until the measured error is at or below the limit, or no layer is left. How layers are found without trying each:
    see Groups. `layers` are in the graph's order, `budget` is how many groups of them may be tried.
    """
    error_all = measured = error(frozenset(layers), JUDGED)
    if measured <= limit:
        return Found(frozenset(layers), (), measured, measured)

    def try_alone(group: Group) -> float:
        advance(len(groups.tried), budget)
        return error(frozenset(group), RANKED)

    groups, kept = Groups(tuple(layers), error_all, try_alone, budget), list[str]()
    while measured > limit and groups.errors:
        allowed = groups.total() * (limit / measured) ** 2
        kept += groups.pop_worst()  # at least one, also where groups alone do not show the error of all
        while groups.total() > allowed:
            kept += groups.pop_worst()
        measured = error(frozenset(layers) - frozenset(kept), JUDGED)
    tried = tuple((group[0], len(group), found) for group, found in groups.tried.items())
    return Found(frozenset(layers) - frozenset(kept), tuple(kept), measured, error_all, tried)


class Groups:
    """Layers that are still quantised, in groups of neighbours with the error of each group.

    A group's error bounds those of its layers. So the worst layer is found by halving whatever group is worst until it
    is a single one: few groups are tried where few layers do most of the damage, and no more than twice the layers
    otherwise. Where the budget is spent, whole groups stand for their layers, each with an even share.
    """

    def __init__(self, layers: Group, error: float, try_alone: Callable[[Group], float], budget: int) -> None:
        self.errors: dict[Group, float] = {layers: error} if layers else {}
        self.tried: dict[Group, float] = {}
        self._try_alone, self._budget = try_alone, budget

    def total(self) -> float:
        """The squared errors of all groups that are left, added up."""
        return sum(error**2 for error in self.errors.values())

    def pop_worst(self) -> Group:
        """The layer that does most damage; several, where the budget does not tell them apart."""
        while len(worst := max(self.errors, key=self.errors.__getitem__)) > 1 and len(self.tried) + 2 <= self._budget:
            del self.errors[worst]
            middle = len(worst) // 2
            for half in (worst[:middle], worst[middle:]):
                self.errors[half] = self.tried[half] = self._try_alone(half)
        if len(worst) > 1:
            worst = max(self.errors, key=lambda group: self.errors[group] ** 2 / len(group))
        del self.errors[worst]
        return worst
