"""The space of a search: the levers that apply, and points of it as sets of overrides, as `--set` takes them.

Overrides are those that differ from the recipe, so that the recipe itself is the point without any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.search.levers import LEVERS, Point
from slipcast_compiler.search.subject import Overrides, Subject


class Space:
    """The levers of a [search]: those it names, or all that apply (with the objective memory: of the engine)."""

    def __init__(self, subject: Subject[Any]) -> None:
        self.facts = facts = subject.facts
        table = facts.search
        offered = {name: lever.dimensions(facts) for name, lever in LEVERS.items()}
        usual = [name for name in LEVERS if LEVERS[name].engine or table.objective == "latency"]
        if idle := [name for name in table.levers if not offered[name]]:
            raise RecipeError(
                f"search.levers: {', '.join(idle)}: this recipe and its checkpoint have no use for it",
                expected=", ".join(name for name in usual if offered[name]), got=", ".join(table.levers),
            )  # fmt: skip
        self.levers = tuple(name for name in LEVERS if name in (table.levers or usual) and offered[name])
        self.dimensions = {name: each for lever in self.levers for name, each in offered[lever].items()}
        self._of = {lever: tuple(offered[lever]) for lever in self.levers}
        if all(len(each.values) < 2 for each in self.dimensions.values()):
            raise RecipeError("[search]: there is nothing to choose between", expected="levers that apply", got="none")
        self._settle = subject.settle
        self.pins = subject.pins(any(LEVERS[name].engine for name in self.levers))

    @property
    def own(self) -> Point:
        """The recipe as a point."""
        return {name: each.own for name, each in self.dimensions.items()}

    def overrides(self, point: Point) -> Overrides:
        """What the point stands for, beside the recipe: none for levers at the recipe's own values, but for `pins`."""
        found = dict(self.pins)
        for name in self.levers:
            lever = LEVERS[name]
            at = {dimension: point[dimension] for dimension in self._of[name]}
            if any(value != self.dimensions[dimension].own for dimension, value in at.items()):
                found |= lever.overrides(self.facts, at)
        return self._settle(found)

    def engine(self, point: Point) -> Point:
        """The values of a point that decide its engine."""
        return {name: point[name] for lever in self.levers if LEVERS[lever].engine for name in self._of[lever]}

    def is_dear(self, point: Point) -> bool:
        """Whether it takes a stage of its own, whatever engine it has."""
        return any(point[name] in each.dear for name, each in self.dimensions.items())

    def summary(self) -> dict[str, Any]:
        """What --dry-run prints: the objective, minutes, and the values of every dimension."""
        table = self.facts.search
        values = {name: list(each.values) for name, each in self.dimensions.items()}
        return {"objective": table.objective, "budget_minutes": table.budget_minutes, "values": values}


def as_arguments(overrides: Mapping[str, Any]) -> str:
    """The `--set` options of a command line, for a shell."""
    return " ".join(f"--set '{key}={_toml(value)}'" for key, value in overrides.items())


def _toml(value: Any) -> str:
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
