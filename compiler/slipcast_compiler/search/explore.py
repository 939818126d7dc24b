"""The loop of a search: ask, measure, and judge in full what nothing beats. Which point is next is Optuna's choice.

Two values of every trial are minimised: the objective, and the distance of latents to the original's, which takes a
second and stands in for quality (TPE with two objectives, Ozaki et al., GECCO 2020). A trial that no earlier one beats
in both is a survivor, and is judged by the limits of the gate.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from slipcast.errors import SlipcastError
from slipcast_compiler.search.journal import FOUND, finished, seconds_spent, told
from slipcast_compiler.search.space import Overrides, Point, Space

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

Found: TypeAlias = dict[str, Any]

DEAR = 0.5  # of the time may go into engines; beyond that, points are tried on those that there are
ATTEMPTS = 8  # of Optuna, to name a point that was not tried; then chance does
SAY_EVERY_S = 20.0


class Evaluate(Protocol):
    """What a point is worth. Both raise SlipcastError where it cannot be."""

    def measure(self, overrides: Overrides) -> Found:
        """At least `objective`, `distance`, and `prepare_s`, the seconds of it that an engine took; plain JSON."""
        ...

    def judge(self, overrides: Overrides) -> Found:
        """At least `holds`: whether the gate's limits hold with a margin."""
        ...


def explore(
    study: Study, space: Space, evaluate: Evaluate, budget_s: float, seed: int, tell: Callable[[str, float], None]
) -> None:
    """Go on until the budget is spent, by earlier runs too, or every point was tried.

    `tell(text, seconds spent)` is called after trials. An error of the first trial, which is the recipe itself, is
    raised; those of others are in the journal.
    """
    points = int(np.prod([len(each.values) for each in space.dimensions.values()]))
    random, last_said, best = np.random.default_rng([seed, len(finished(study))]), -SAY_EVERY_S, None
    while (spent := seconds_spent(study)) < budget_s:
        trials = finished(study)
        if len({_key(trial.params) for trial in trials}) >= points:
            return
        begin, found = time.perf_counter(), Found()
        trial = _ask(study, space, trials, random)
        overrides = space.overrides(point_of(space, trial.params))
        try:
            found = evaluate.measure(overrides)
            if survives(found, [told(each) for each in trials]):
                found |= evaluate.judge(overrides)
        except SlipcastError as error:
            if not trials:
                raise
            found["error"] = str(error)
        trial.set_user_attr(FOUND, found | {"overrides": overrides, "took_s": round(time.perf_counter() - begin, 3)})
        _finish(study, trial, found)
        chosen, now = choose(study), time.monotonic()
        if chosen is not best or now - last_said > SAY_EVERY_S:
            last_said, best = now, chosen
            tell(_progress(study, best, budget_s), spent)


def survives(found: Found, others: Iterable[Found]) -> bool:
    """Whether no other is better in one value and not worse in the other."""
    here = found["objective"], found["distance"]
    rest = [(other["objective"], other["distance"]) for other in others if "error" not in other]
    return not any(a <= here[0] and b <= here[1] and (a, b) != here for a, b in rest)


def front(study: Study) -> list[FrozenTrial]:
    """Finished trials that no other one beats, by objective."""
    sound = [trial for trial in finished(study) if "error" not in told(trial)]
    return sorted(
        (trial for trial in sound if survives(told(trial), map(told, sound))), key=lambda t: told(t)["objective"]
    )


def choose(study: Study) -> FrozenTrial | None:
    """The least objective among the trials that hold the gate with a margin; of equals, the nearest to the original."""
    holding = [trial for trial in finished(study) if told(trial).get("holds")]
    return min(holding, key=lambda t: (told(t)["objective"], told(t)["distance"]), default=None)


def point_of(space: Space, params: dict[str, Any]) -> Point:
    """What Optuna calls values by: their places where they are ordered, else their names."""
    return {
        name: each.values[params[name]] if each.ordered else params[name] for name, each in space.dimensions.items()
    }


def _params(space: Space, point: Point) -> dict[str, Any]:
    ordered = space.dimensions
    return {name: ordered[name].values.index(v) if ordered[name].ordered else v for name, v in point.items()}


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    return {
        name: IntDistribution(0, len(each.values) - 1) if each.ordered else CategoricalDistribution(each.values)
        for name, each in space.dimensions.items()
    }


def _ask(study: Study, space: Space, trials: Sequence[FrozenTrial], random: np.random.Generator) -> Trial:
    """A point that was not tried: the recipe, then Optuna's proposals, or a neighbour by chance where it repeats."""
    from optuna.trial import TrialState

    tried, distributions = {_key(trial.params) for trial in trials}, _distributions(space)
    study.sampler = _sampler(study, space, int(random.integers(2**31)))
    if not tried:
        study.enqueue_trial(_params(space, space.own))
    for _ in range(ATTEMPTS):
        trial = study.ask(distributions)
        if _key(trial.params) not in tried:
            return trial
        study.tell(trial, state=TrialState.FAIL)
    while True:
        point = {name: each.values[random.integers(len(each.values))] for name, each in space.dimensions.items()}
        if _key(params := _params(space, point)) not in tried:
            study.enqueue_trial(params)
            return study.ask(distributions)


def _sampler(study: Study, space: Space, seed: int) -> Any:
    """TPE; on the best trial's engine alone, while engines have taken more than their share of the time."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=2 * len(space.dimensions))
        sound = [trial for trial in finished(study) if "error" not in told(trial)]
        if sum(told(trial).get("prepare_s", 0.0) for trial in finished(study)) <= DEAR * seconds_spent(study):
            return sampler
        known = choose(study) or min(sound, key=lambda trial: told(trial)["objective"], default=None)
        if known is None:
            return sampler
        kept = _params(space, space.cheap(point_of(space, known.params)))
        return optuna.samplers.PartialFixedSampler(kept, sampler)


def _finish(study: Study, trial: Trial, found: Found) -> None:
    from optuna.trial import TrialState

    if "error" in found:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, [found["objective"], found["distance"]])


def _progress(study: Study, best: FrozenTrial | None, budget_s: float) -> str:
    trials, left = finished(study), max(0.0, budget_s - seconds_spent(study))
    told_best = "none holds the gate so far"
    if best:
        found = told(best)
        told_best = f"best {found['shown']}, distance {found['distance']:.3f} (trial {best.number})"
    return f"  {len(trials)} trials, {told_best}, {left / 60:.1f} minutes left"


def _key(params: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))
