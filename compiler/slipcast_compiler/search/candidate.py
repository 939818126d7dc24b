"""From a point to something that runs: the recipe with its overrides, and engines for the target that is measured.

The graphs are those that a compile would make, from the same cache: what is chosen is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slipcast.bundle.validation import dotted, problems
from slipcast.errors import RecipeError
from slipcast.progress import SilentStages
from slipcast_compiler.engines.contents import write_bundle
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.graphs import make_graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.plan import Plan, replan
from slipcast_compiler.recipe.reading import put
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.recipe.targets import TargetTable
from slipcast_compiler.search.levers import measured_target
from slipcast_compiler.search.measuring import Variant


@dataclass(frozen=True)
class Candidate:
    """A point as graphs, and the target that is measured of it."""

    graphs: Graphs
    table: TargetTable

    @property
    def key(self) -> str:
        """What decides its engines; candidates that differ in the rest share them."""
        components = {name: folder.name for name, folder in self.graphs.components.items()}
        quantized = {
            precision: {name: each.folder.name for name, each in made.items()}
            for precision, made in self.graphs.quantized.items()
        }
        return json.dumps([components, quantized, self.table.model_dump(mode="json")], sort_keys=True)

    def build(self, folder: Path, cache: Cache) -> str:
        """Its engines, in `folder`, which is new: a bundle of its own. Returns the target's id.

        In half precision all of it is cast: what has to stay in fp32 is left for the compile to find, and its gate to
        judge.
        """
        folder.mkdir()
        return write_bundle(self.graphs, self.table, folder, cache).id

    def variant(self, folder: Path) -> Variant:
        """How it samples, with the engines in `folder`."""
        return Variant(folder, self.graphs.sampling, self.graphs.step, self.graphs.caching)


def make_candidate(plan: Plan, cache: Cache) -> Candidate:
    """The graphs of a point's plan, for the first target that can run here."""
    return Candidate(make_graphs(plan, cache, SilentStages()), plan.recipe.targets[measured_target(plan)])


def apply(plan: Plan, overrides: Mapping[str, Any]) -> Plan:
    """The plan of the recipe with these overrides and without [search]; RecipeError where they contradict."""
    document = plan.recipe.model_dump(mode="json", exclude_none=True)
    document.pop("search", None)
    for key, value in overrides.items():
        put(document, key, value, "a trial")
    return replan(plan, _validated(document))


def apply_trial(plan: Plan, overrides: Mapping[str, Any]) -> Plan:
    """The same for measuring: without a guard, and quantised for the measured target alone. Else its stages are those
    of the compile, which finds them in the cache."""
    document = apply(plan, overrides).recipe.model_dump(mode="json", exclude_none=True)
    document.pop("guard", None)
    place = measured_target(plan)
    first = document["targets"][place]
    for precision, table in (("int8", "quantize"), ("int4", "quantize_int4")):
        if first["precision"] != precision:
            document["passes"].pop(table, None)
            document["targets"] = [t for t in document["targets"] if t["precision"] != precision]
    return replan(plan, _validated(document))


def _validated(document: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        found = "; ".join(f"{dotted(where)}: {what}" for where, what in problems(error, Recipe))
        raise RecipeError(f"the trial contradicts itself: {found}") from None
