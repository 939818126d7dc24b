"""What a report says of a search, taken from its journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slipcast_compiler.pages.search import Limit, SearchRecord, Trial
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.search.explore import choose, front
from slipcast_compiler.search.journal import finished, seconds_spent, told
from slipcast_compiler.search.judge import limits
from slipcast_compiler.search.space import Space, as_arguments

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


def record_search(study: Study, recipe: Recipe, space: Space) -> SearchRecord:
    """All that is known of it so far."""
    table, best = recipe.search, choose(study)
    assert table
    trials, overrides = finished(study), told(best)["overrides"] if best else {}
    return SearchRecord(
        objective=table.objective,
        budget_minutes=table.budget_minutes,
        seed=table.seed,
        spent_minutes=round(seconds_spent(study) / 60, 2),
        levers={
            name: (each.values[0], each.values[-1]) if each.ordered else tuple(each.values)
            for name, each in space.dimensions.items()
        },
        gate=tuple(_limit(*row) for row in limits(recipe.gate)),
        front=tuple(trial.number for trial in front(study)),
        chosen=best.number if best else None,
        overrides=overrides,
        arguments=as_arguments(overrides),
        nearest=_nearest(trials),
        trials=tuple(_trial(trial) for trial in trials),
    )


def _limit(limit: float, label: str, metric: str, sense: Any) -> Limit:
    return Limit(metric=metric, label=label, limit=limit, sense=sense)


def _trial(trial: FrozenTrial) -> Trial:
    found = {key: value for key, value in told(trial).items() if key != "shown"}
    return Trial(number=trial.number, arguments=as_arguments(found["overrides"]), **found)


def _nearest(trials: list[FrozenTrial]) -> str:
    """The judged trial whose latents were nearest to the original's, in words."""
    judged = [trial for trial in trials if "holds" in told(trial)]
    if not judged:
        return "no trial that could be judged"
    nearest = min(judged, key=lambda trial: float(told(trial)["distance"]))
    found = told(nearest)
    bounds = ", ".join(f"{metric} {value:.4f}" for metric, value in found["bounds"].items())
    return f"trial {nearest.number}, the nearest to the original: {bounds or 'pictures that are not finite'}"
