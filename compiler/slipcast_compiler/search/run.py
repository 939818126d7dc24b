"""The stage of a compile that chooses: from a plan with [search] to the plan of the best point that was found."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipcast.errors import CheckFailed
from slipcast.progress import Stages
from slipcast_compiler.host.cache import Cache, tool_versions
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.passes.apply import needs_profile
from slipcast_compiler.recipe.search import PROFILED
from slipcast_compiler.search.evaluate import Evaluator
from slipcast_compiler.search.explore import SearchEnded, choose, explore
from slipcast_compiler.search.journal import open_journal, seconds_spent, told
from slipcast_compiler.search.record import record_search
from slipcast_compiler.search.space import Space
from slipcast_compiler.search.subject import Overrides, PlanT_co, Subject

if TYPE_CHECKING:
    from optuna.study import Study


def choose_by_search(subject: Subject[PlanT_co], cache: Cache, stages: Stages) -> tuple[PlanT_co, dict[str, Any]]:
    """The plan with the overrides that are best within the gate on calibration prompts, and a record for the report.

    The journal is beside the cache, under the hash of all that decides: a search that was ended goes on, and the result
    of one that was finished is taken from there. Raises CheckFailed where no point holds the gate with a margin.
    """
    space, facts = Space(subject), subject.facts
    table = facts.search
    folder = cache.root.parent / "search" / f"{facts.recipe.name}-{_hash(subject, space)}"
    with open_journal(folder) as study:
        if seconds_spent(study) < table.budget_minutes * 60:
            with _said_on_interrupt(folder, stages), _scratch(folder) as work:
                _go_on(study, subject, space, work, cache, stages)
        best, record = choose(study), record_search(study, facts.recipe, space)
    if best is None:
        raise CheckFailed(
            "the search found nothing that holds the gate with a margin on calibration prompts; nothing was compiled",
            expected="limits that hold for the 95 % interval", got=record.nearest,
            hint="raise search.budget_minutes (finished trials are kept) or evaluate.images, or loosen the limits",
        )  # fmt: skip
    stages.say(f"  chosen: {record.arguments or 'the recipe as it is'}")
    return subject.apply(told(best)["overrides"]), record.plain()


def _go_on(study: Study, subject: Subject[Any], space: Space, work: Path, cache: Cache, stages: Stages) -> None:
    """Until the budget is spent; what trials share comes before, and does not count."""
    table = space.facts.search
    budget_s = table.budget_minutes * 60
    if needs_profile(space.facts.recipe.passes) or PROFILED & set(space.levers):
        subject.profile(space.pins, cache, stages)
    with Evaluator(subject, space.pins, cache, work, stages) as evaluator, stages.stage("choose by search") as advance:

        def tell(text: str, spent: float) -> None:
            stages.say(text)
            advance(min(int(spent), int(budget_s)), int(budget_s))

        explore(study, space, _Watched(evaluator), budget_s, table.seed, tell)


class _Watched:
    """An evaluator that stops where the compiler's code is no longer what the search began with: processes that are
    started for a trial would run the new one."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self.judge = evaluator, evaluator.judge

    def measure(self, overrides: Overrides) -> dict[str, Any]:
        if tool_versions.__wrapped__() != tool_versions():
            raise CodeChanged("the compiler's code was changed during the search", hint="run the command again")
        return self._evaluator.measure(overrides)


class CodeChanged(SearchEnded):
    """Trials before and after it cannot be compared."""


def _hash(subject: Subject[Any], space: Space) -> str:
    """Of the recipe but for its name and budget, the checkpoint, what may be turned here, the libraries and the code,
    and the machine."""
    recipe = subject.facts.recipe.model_dump(mode="json", exclude={"name": True, "search": {"budget_minutes"}})
    decides = {
        "recipe": recipe, "levers": space.summary()["values"], **subject.decides(),
        "tools": tool_versions(), "host": this_machine().model_dump(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for engines in use; what a killed search left of it is removed."""
    for left in folder.glob("engines-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="engines-", dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def _said_on_interrupt(folder: Path, stages: Stages) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        stages.say(f"finished trials are kept in {folder}; the same command goes on with the search")
        raise
