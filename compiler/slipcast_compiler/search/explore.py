"""The loop of a search: propose, measure, and judge in full what nothing beats.

Two values of every trial are minimised: the objective, and the distance of a few results to the original's, which takes
a second and stands in for quality. A trial that no earlier one beats in both is a survivor, and is judged by the limits
of the gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from slipcast.errors import SlipcastError
from slipcast_compiler.search.journal import finished, keep, seconds_spent, told
from slipcast_compiler.search.levers import Point
from slipcast_compiler.search.propose import distributions, key, propose, to_point
from slipcast_compiler.search.space import Space
from slipcast_compiler.search.subject import Overrides

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Found: TypeAlias = dict[str, Any]

DEAR = 0.5  # of the time may go into engines and lists of timesteps; beyond that, points take those that there are
SAY_EVERY_S = 20.0


class SearchEnded(SlipcastError):  # noqa: N818 - named for what happened
    """No other trial can be compared with those before: it ends a search, whose finished trials are kept."""


class Evaluate(Protocol):
    """What a point is worth. Both raise SlipcastError where it cannot be, and SearchEnded where no other can."""

    def measure(self, overrides: Overrides) -> Found:
        """At least `objective`, `shown` (the same in words), `distance`, and `prepare_s`, the seconds of it that an
        engine took; plain JSON."""
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
    last_said, best = -SAY_EVERY_S, None
    while (spent := seconds_spent(study)) < budget_s:
        trials = finished(study)
        if len({key(trial.params) for trial in trials}) >= points:
            return
        begin, known = time.perf_counter(), [(trial.params, told(trial)) for trial in trials]
        mixed = int(np.random.default_rng([seed, len(known)]).integers(2**31))  # a resumed search is not the same again
        params = propose(space, known, _kept(study, space, trials), mixed)
        overrides = space.overrides(to_point(space, params))
        found = _evaluate(evaluate, overrides, [each for _, each in known])
        took = {"overrides": overrides, "took_s": round(time.perf_counter() - begin, 3)}
        keep(study, params, distributions(space), found | took)
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
    best = (trial for trial in sound if survives(told(trial), map(told, sound)))
    return sorted(best, key=lambda trial: float(told(trial)["objective"]))


def choose(study: Study) -> FrozenTrial | None:
    """The least objective among the trials that hold the gate with a margin; of equals, the nearest to the original."""
    holding = [trial for trial in finished(study) if told(trial).get("holds")]
    return min(holding, key=lambda t: (told(t)["objective"], told(t)["distance"]), default=None)


def _kept(study: Study, space: Space, trials: list[FrozenTrial]) -> Point:
    """The best trial's engine, while what had to be made for trials has taken more than its share of the time."""
    prepared = sum(told(trial).get("prepare_s", 0.0) for trial in trials)
    sound = [trial for trial in trials if "error" not in told(trial)]
    if prepared <= DEAR * seconds_spent(study) or not sound:
        return {}
    known = choose(study) or min(sound, key=lambda trial: float(told(trial)["objective"]))
    return space.engine(to_point(space, known.params))


def _evaluate(evaluate: Evaluate, overrides: Overrides, earlier: list[Found]) -> Found:
    """Measured and, where it survives, judged; with `error` in place of what could not be, unless it is the first."""
    found, begin = Found(), time.perf_counter()
    try:
        found = evaluate.measure(overrides)
        if survives(found, earlier):
            found |= evaluate.judge(overrides)
    except SlipcastError as error:
        if not earlier or isinstance(error, SearchEnded):
            raise
        found = {"prepare_s": round(time.perf_counter() - begin, 3)} | found | {"error": str(error)}
    return found


def _progress(study: Study, best: FrozenTrial | None, budget_s: float) -> str:
    trials, left = finished(study), max(0.0, budget_s - seconds_spent(study))
    told_best = "none holds the gate so far"
    if best:
        found = told(best)
        told_best = f"best {found['shown']}, distance {found['distance']:.3f} (trial {best.number})"
    return f"  {len(trials)} trials, {told_best}, {left / 60:.1f} minutes left"
