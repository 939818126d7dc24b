"""The loop and its journal, on a formula in place of engines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from explored import Formula, planned

from slipcast.errors import ArtifactError, NumericalError, ResourceError
from slipcast_compiler.pages.search import SearchRecord, figures
from slipcast_compiler.search.described import Described
from slipcast_compiler.search.explore import SearchEnded, choose, explore, front, survives
from slipcast_compiler.search.journal import JOURNAL, finished, open_journal, seconds_spent, told
from slipcast_compiler.search.propose import parting_distance, propose, to_params, to_point
from slipcast_compiler.search.record import record_search
from slipcast_compiler.search.space import Space

FEW = ('search.levers=["steps", "heads"]', "reference.steps=7")


def search(folder: Path, evaluate: Any, budget_s: float = 60.0, *overrides: str) -> dict[str, Any]:
    """All points of two levers; what the report says of them."""
    plan = planned(*(overrides or FEW))
    space = Space(Described(plan))
    with open_journal(folder) as study:
        explore(study, space, evaluate, budget_s, 0, lambda text, spent: None)
        return record_search(study, plan.recipe, space).plain()


def test_every_point_is_tried_once_and_the_best_that_holds_is_chosen(tmp_path: Path) -> None:
    record = search(tmp_path / "a", Formula(tmp_path / "log"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(record["trials"]) == 5 * 5
    assert "sampling.steps" not in lines[0]  # the recipe itself comes first
    holding = [trial for trial in record["trials"] if trial.get("holds")]
    assert holding
    chosen = next(trial for trial in record["trials"] if trial["number"] == record["chosen"])
    assert chosen["objective"] == min(trial["objective"] for trial in holding)
    # The best of all points that hold, and not only of those that were judged.
    every = [(Formula().measure(t["overrides"]), Formula().judge(t["overrides"])["holds"]) for t in record["trials"]]
    assert chosen["objective"] == min(found["objective"] for found, holds in every if holds)
    on_front = {(t["objective"], t["distance"]) for t in record["trials"] if t["number"] in record["front"]}
    distances = [distance for _, distance in sorted(on_front)]
    assert len(distances) > 3 and distances == sorted(distances, reverse=True)
    again = search(tmp_path / "a", Formula(tmp_path / "log"))
    assert again == record
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_optuna_finds_more_than_chance_would(tmp_path: Path) -> None:
    plan = planned()
    space = Space(Described(plan))
    with open_journal(tmp_path / "a") as study:
        explore(study, space, Formula(), 3.0, 0, lambda text, spent: None)
        best = choose(study)
        assert best
        assert told(best)["objective"] < 0.85  # 4 or 5 steps; the recipe's own 6 are 1
        assert seconds_spent(study) >= 3.0


@pytest.mark.slow
def test_finished_trials_outlive_sigkill(tmp_path: Path) -> None:
    folder, log = tmp_path / "search", tmp_path / "log"
    command = [sys.executable, "tests/compiler/search/explored.py", str(folder), "60"]
    path = os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 12):
        time.sleep(0.02)
    with pytest.raises(ResourceError, match=f"process {child.pid}"), open_journal(folder):
        pass
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with (folder / JOURNAL).open("a") as stream:  # killed while it wrote
        stream.write('{"op_code":5,"worker')
    before = log.read_text().splitlines()
    assert len(before) >= 12
    with open_journal(folder) as study:
        kept = [told(trial)["overrides"] for trial in finished(study)]
        assert len(before) - 1 <= len(kept) <= len(before)  # at most the running trial is lost
        spent = seconds_spent(study)
        assert 0 < spent < 60
        explore(study, Space(Described(planned())), Formula(log), spent + 2.0, 0, lambda text, spent: None)
        assert [told(trial)["overrides"] for trial in finished(study)][: len(kept)] == kept
        assert len(finished(study)) > len(kept)
    counts = Counter(log.read_text().splitlines())
    assert all(count == 1 for line, count in counts.items() if line != before[-1])


def test_a_point_that_cannot_be_is_told_and_passed_over(tmp_path: Path) -> None:
    class Partly(Formula):
        def measure(self, overrides: dict[str, Any]) -> dict[str, Any]:
            if overrides.get("sampling.steps") == 3:
                raise NumericalError("latents are not finite")
            return super().measure(overrides)

    record = search(tmp_path / "a", Partly())
    broken = [trial for trial in record["trials"] if "error" in trial]
    assert len(broken) == 5
    assert all("not finite" in trial["error"] and trial["number"] not in record["front"] for trial in broken)

    class Never(Formula):
        def measure(self, overrides: dict[str, Any]) -> dict[str, Any]:
            raise NumericalError("nothing works")

    with pytest.raises(NumericalError, match="nothing works"):  # the recipe itself
        search(tmp_path / "b", Never())

    class Ends(Partly):
        def measure(self, overrides: dict[str, Any]) -> dict[str, Any]:
            if "passes.prune_heads.ratio" in overrides:
                raise SearchEnded("the code is another")
            return super().measure(overrides)

    with pytest.raises(SearchEnded, match="the code is another"):  # and no trial is noted to have failed
        search(tmp_path / "c", Ends())
    with open_journal(tmp_path / "c") as study:
        assert finished(study) and not any("another" in told(trial).get("error", "") for trial in finished(study))


def test_engines_take_no_more_than_their_share(tmp_path: Path) -> None:
    class Dear(Formula):
        def __init__(self) -> None:
            super().__init__()
            self.engines: list[float] = []

        def measure(self, overrides: dict[str, Any]) -> dict[str, Any]:
            heads = overrides.get("passes.prune_heads.ratio", 0.3)
            found = super().measure(overrides)
            if heads not in self.engines:
                self.engines.append(heads)
                time.sleep(0.5)
                found["prepare_s"] = 0.5
            return found

    evaluate = Dear()
    search(tmp_path / "a", evaluate, 1.6, 'search.levers=["steps", "heads", "guidance_interval"]')
    assert len(evaluate.engines) <= 3


def test_what_is_dear_is_left_out_while_the_engine_is_kept() -> None:
    space = Space(Described(planned()))
    own = to_params(space, space.own)
    known = [(own, {"objective": 1.0, "distance": 0.2, "holds": True})]
    for seed in range(8):
        proposed = to_point(space, propose(space, known, space.engine(space.own), seed))
        assert space.engine(proposed) == space.engine(space.own)
        assert not space.is_dear(proposed) and to_params(space, proposed) != own
        known.append((to_params(space, proposed), {"objective": 0.5 + seed / 10, "distance": 0.3}))
    assert any(space.is_dear(to_point(space, propose(space, known, {}, seed))) for seed in range(40))


def test_the_distance_that_parts_what_holds() -> None:
    def judged(*rows: tuple[float, bool]) -> list[dict[str, Any]]:
        return [{"distance": distance, "holds": holds} for distance, holds in rows]

    assert parting_distance([]) is None
    assert parting_distance(judged((0.1, False))) is None
    assert parting_distance(judged((0.1, True), (0.2, True), (0.3, False))) == 0.2
    # One that was lucky does not decide alone.
    assert parting_distance(judged((0.1, True), (0.2, True), (0.3, False), (0.4, False), (0.5, True))) == 0.2


def test_what_survives() -> None:
    others: list[dict[str, Any]] = [{"objective": 1.0, "distance": 0.5}, {"objective": 0.1, "error": "x"}]
    assert survives({"objective": 0.9, "distance": 0.6}, others)
    assert survives({"objective": 1.0, "distance": 0.5}, others)
    assert not survives({"objective": 1.0, "distance": 0.6}, others)


def test_a_damaged_journal_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("not a journal\nat all\n")
    with pytest.raises(ArtifactError, match="journal.log: damaged"), open_journal(tmp_path):
        pass


def test_the_pictures_of_a_search(tmp_path: Path) -> None:
    record = search(tmp_path / "a", Formula())
    (_, distance), (caption, gate) = figures(SearchRecord.model_validate(record, strict=False))
    assert distance.count("<circle") == len(record["trials"])
    kinds = re.findall(r'<g class="(\w+)">(?=.*?<circle)', distance)
    assert kinds.count("chosen") == 1
    assert kinds[-1] == "chosen"  # on top of the others
    assert caption.startswith("CLIP change, mean: ")
    dots = re.findall(r'<g class="(\w+)">.*?cy="([\d.]+)"', gate)
    assert {kind for kind, _ in dots} <= {"chosen", "holds", "front", "tried"}
    limit = float(re.findall(r'class="limit" d="M\S+ ([\d.]+)', gate)[0])
    above = [float(y) <= limit for kind, y in dots if kind in ("chosen", "holds")]
    assert above and all(above)  # within the limit is upwards
    with open_journal(tmp_path / "a") as study:
        assert record["front"] == [trial.number for trial in front(study)]
