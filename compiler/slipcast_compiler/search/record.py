"""What a report says of a search; plain JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slipcast_compiler.plan import Plan
from slipcast_compiler.search.explore import choose, front
from slipcast_compiler.search.journal import finished, seconds_spent, told
from slipcast_compiler.search.judge import limits
from slipcast_compiler.search.space import Space, as_arguments

if TYPE_CHECKING:
    from optuna.study import Study


def describe(study: Study, plan: Plan, space: Space) -> dict[str, Any]:
    """`trials` in their order, each with the `--set` options that make it again; those on the Pareto front and the
    `chosen` one by number."""
    table, best = plan.recipe.search, choose(study)
    assert table
    trials = finished(study)
    return {
        "objective": table.objective, "budget_minutes": table.budget_minutes, "seed": table.seed,
        "spent_minutes": round(seconds_spent(study) / 60, 2),
        "levers": {
            name: [each.values[0], each.values[-1]] if each.ordered else list(each.values)
            for name, each in space.dimensions.items()
        },
        "gate": [{"metric": metric, "label": label, "limit": limit, "sense": sense}
                 for limit, label, metric, sense in limits(plan.recipe.gate)],
        "front": [trial.number for trial in front(study)],
        "chosen": best and best.number,
        "overrides": told(best)["overrides"] if best else {},
        "arguments": as_arguments(told(best)["overrides"]) if best else "",
        "nearest": _nearest(trials),
        "trials": [
            {"number": trial.number, "arguments": as_arguments(told(trial)["overrides"])}
            | {key: value for key, value in told(trial).items() if key != "shown"}
            for trial in trials
        ],
    }  # fmt: skip


def _nearest(trials: list[Any]) -> str:
    """The judged trial whose latents were nearest to the original's, in words."""
    judged = [trial for trial in trials if "holds" in told(trial)]
    if not judged:
        return "no trial that could be judged"
    nearest = min(judged, key=lambda trial: told(trial)["distance"])
    found = told(nearest)
    bounds = ", ".join(f"{metric} {value:.4f}" for metric, value in found["bounds"].items())
    return f"trial {nearest.number}, the nearest to the original: {bounds or 'pictures that are not finite'}"
