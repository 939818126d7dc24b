"""What a search asks of what it turns: a described model (described.py), or a captured pipeline (captured.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from pydantic import ValidationError

from slipcast.bundle.sampling import Sampling
from slipcast.bundle.validation import dotted, problems
from slipcast.engines import ENGINES
from slipcast.errors import RecipeError
from slipcast.progress import Stages
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge.metrics import Floats, Samples
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.recipe.family import Family
from slipcast_compiler.recipe.reading import put
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.recipe.search import SearchTable
from slipcast_compiler.recipe.targets import TargetTable
from slipcast_compiler.search.measuring import Image, Variant

Overrides: TypeAlias = dict[str, Any]
PlanT_co = TypeVar("PlanT_co", covariant=True)

PROXIES = 8  # images whose distance to the original's is measured


@dataclass(frozen=True)
class Facts:
    """What levers look at. `sampling`: the recipe's, and `reference`, the original's; None where slipcast's samplers do
    not take the steps. `prompts`: how many there are to calibrate on, if the model takes any. `rewritable`: levers of
    passes that find something to do. `guided`: whether guidance can be left out at some steps; `cacheable`: whether
    features may be cached."""

    recipe: Recipe
    sampling: Sampling | None
    reference: Sampling | None
    few_step: bool
    prompts: int | None
    rewritable: Collection[str]
    guided: bool
    cacheable: bool
    denoiser_parameters: int

    @property
    def search(self) -> SearchTable:
        """The recipe's [search]."""
        assert self.recipe.search
        return self.recipe.search


class Candidate(Protocol):
    """A point as graphs, and the target that is measured of it."""

    @property
    def key(self) -> str:
        """What decides its engines; candidates that differ in the rest share them."""
        ...

    def build(self, folder: Path, cache: Cache) -> str:
        """Its engines, in `folder`, which is new: a bundle of its own. Returns the target's id.

        Of described models all is cast in half precision: what has to stay in fp32 is left for the compile to find, and
        its gate to judge.
        """
        ...

    def variant(self, folder: Path) -> Variant:
        """How it samples, with the engines in `folder`."""
        ...


@dataclass(frozen=True)
class Drawn:
    """Calibration prompts by the original, none of which is held out: some whose results are compared number by number,
    and others on which the gate is judged. `samples(results)`: of these, its metrics."""

    proxies: tuple[Image, ...]
    results: tuple[Floats, ...]
    judged: tuple[Image, ...]
    samples: Callable[[list[Floats]], Samples]


class Subject(Protocol[PlanT_co]):
    """A plan whose recipe has [search]."""

    @property
    def facts(self) -> Facts:
        """See Facts."""
        ...

    def pins(self, engine: bool) -> Overrides:
        """What has to be the same for all points; `engine`: whether a lever decides the engine."""
        ...

    def settle(self, overrides: Overrides) -> Overrides:
        """The same without what has no use beside the rest."""
        ...

    def decides(self) -> dict[str, Any]:
        """What the result of a search depends on, beside the recipe; plain JSON."""
        ...

    def profile(self, overrides: Overrides, cache: Cache, stages: Stages) -> None:
        """Measure what passes read, if `overrides` or levers turn any on."""
        ...

    def draw(self, overrides: Overrides, cache: Cache, stages: Stages) -> Drawn:
        """By the original; `overrides`: the pins. Before any candidate."""
        ...

    def candidate(self, overrides: Overrides, cache: Cache) -> Candidate:
        """Of the first target that can run here. Its stages are those of the compile, which finds them in the cache."""
        ...

    def apply(self, overrides: Overrides) -> PlanT_co:
        """The plan of the recipe with these overrides and without [search]; RecipeError where they contradict."""
        ...


def measured_target(recipe: Recipe) -> int:
    """The place, among the recipe's targets, of the first that can run here."""
    return next(i for i, target in enumerate(recipe.targets) if ENGINES[target.engine].available())


def measured_table(recipe: Recipe) -> TargetTable:
    """That target."""
    return recipe.targets[measured_target(recipe)]


def split_prompts(family: Family | None, images: int) -> tuple[Prompts, Prompts]:
    """Calibration prompts, ranked by their hash as those of a profile: up to PROXIES, and up to `images` others;
    RecipeError where there are not two."""
    ranked = family.ranked if family else ()
    if not family:
        return (None,) * PROXIES, (None,) * images
    if len(ranked) < 2:
        raise RecipeError(
            "[search]: the family is too small", expected="at least two calibration prompts", got=len(ranked)
        )
    count = min(PROXIES, len(ranked) // 2)
    return ranked[:count], ranked[count:][:images]


def turned(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with these overrides and without [search]; RecipeError where they contradict."""
    # Tables that are not in it stay out: a captured pipeline's may not have others.
    document = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    document.pop("search", None)
    for key, value in overrides.items():
        put(document, key, value, "a trial")
    return _validated(document)


def trial_of(recipe: Recipe) -> Recipe:
    """The same for measuring: without a guard and slots for adapters, and quantised for the measured target alone."""
    document = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    for table in ("guard", "adapters"):
        document.pop(table, None)
    first = document["targets"][measured_target(recipe)]
    for precision, table in (("int8", "quantize"), ("int4", "quantize_int4")):
        if first.get("precision") != precision:
            document.get("passes", {}).pop(table, None)
            document["targets"] = [t for t in document["targets"] if t.get("precision") != precision]
    return _validated(document)


def _validated(document: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        found = "; ".join(f"{dotted(where)}: {what}" for where, what in problems(error, Recipe))
        raise RecipeError(f"the trial contradicts itself: {found}") from None
