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

from slipcast.errors import CheckFailed, SlipcastError
from slipcast.progress import Stages
from slipcast_compiler.host.cache import Cache, tool_versions
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.passes.apply import needs_profile
from slipcast_compiler.plan import Plan
from slipcast_compiler.profile.profile import make_profile
from slipcast_compiler.search.candidate import apply
from slipcast_compiler.search.evaluate import Evaluator
from slipcast_compiler.search.explore import choose, explore
from slipcast_compiler.search.journal import open_journal, seconds_spent, told
from slipcast_compiler.search.record import record_search
from slipcast_compiler.search.space import Space

if TYPE_CHECKING:
    from optuna.study import Study

PROFILED = {"heads", "ffn", "low_rank"}  # levers whose passes read the profile


def choose_by_search(plan: Plan, cache: Cache, stages: Stages) -> tuple[Plan, dict[str, Any]]:
    """The plan with the overrides that are best within the gate on calibration prompts, and a record for the report.

    The journal is beside the cache, under the hash of all that decides: a search that was ended goes on, and the result
    of one that was finished is taken from there. Raises CheckFailed where no point holds the gate with a margin.
    """
    space, table = Space(plan), plan.recipe.search
    assert table
    folder = cache.root.parent / "search" / f"{plan.recipe.name}-{_hash(plan)}"
    with open_journal(folder) as study:
        if seconds_spent(study) < table.budget_minutes * 60:
            with _said_on_interrupt(folder, stages), _scratch(folder) as work:
                _go_on(study, plan, space, work, cache, stages)
        best, record = choose(study), record_search(study, plan, space)
    if best is None:
        raise CheckFailed(
            "the search found nothing that holds the gate with a margin on calibration prompts; nothing was compiled",
            expected="limits that hold for the 95 % interval", got=record.nearest,
            hint="raise search.budget_minutes (finished trials are kept) or evaluate.images, or loosen the limits",
        )  # fmt: skip
    stages.say(f"  chosen: {record.arguments or 'the recipe as it is'}")
    return apply(plan, told(best)["overrides"]), record.plain()


def _go_on(study: Study, plan: Plan, space: Space, work: Path, cache: Cache, stages: Stages) -> None:
    """Until the budget is spent; what trials share comes before, and does not count."""
    assert plan.recipe.search
    base, budget_s = apply(plan, space.pins), plan.recipe.search.budget_minutes * 60
    if needs_profile(base.recipe.passes) or PROFILED & set(space.levers):
        with stages.stage("profile") as advance:
            make_profile(base.task.calibration, base.recipe.profile, base.recipe.name, cache, advance)
    with Evaluator(plan, space.pins, cache, work, stages) as evaluator, stages.stage("choose by search") as advance:

        def tell(text: str, spent: float) -> None:
            stages.say(text)
            advance(min(int(spent), int(budget_s)), int(budget_s))

        explore(study, space, _Watched(evaluator), budget_s, plan.recipe.search.seed, tell)


class _Watched:
    """An evaluator that stops where the compiler's code is no longer what the search began with: processes that are
    started for a trial would run the new one."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self.judge = evaluator, evaluator.judge

    def measure(self, overrides: dict[str, Any]) -> dict[str, Any]:
        if tool_versions.__wrapped__() != tool_versions():
            raise CodeChanged("the compiler's code was changed during the search", hint="run the command again")
        return self._evaluator.measure(overrides)


class CodeChanged(SlipcastError):  # noqa: N818 - named for what happened
    """Trials before and after it cannot be compared."""


def _hash(plan: Plan) -> str:
    """Of the recipe but for its name and budget, the checkpoint, the libraries and the code, and the machine."""
    recipe = plan.recipe.model_dump(mode="json", exclude={"name": True, "search": {"budget_minutes"}})
    decides = {
        "recipe": recipe, "checkpoint": plan.checkpoint.sha256, "family": plan.family and plan.family.hash,
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
