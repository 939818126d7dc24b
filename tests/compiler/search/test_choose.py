"""The whole way on a small checkpoint with random weights: search, Ctrl-C, from the journal, bundle and report."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compiler.passes.tiny import RECIPE, write_tiny
from conftest import call_cli
from slipcast.bundle.reader import open_bundle
from slipcast.errors import CheckFailed
from slipcast.progress import Stages
from slipcast_compiler.host import closure
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import read_recipe
from slipcast_compiler.search import run
from slipcast_compiler.search.described import Described
from slipcast_compiler.search.journal import JOURNAL
from slipcast_compiler.search.space import Space

SEARCHED = (
    RECIPE.replace("steps = 2", "steps = 6")
    + """
[cut]
[evaluate]
images = 4
[gate]
psnr = 8.0
[search]
levers = ["steps", "guidance_interval", "caching", "ffn"]
"""
)


slow = pytest.mark.slow  # a search of a minute, and a compile


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a recipe with [search]."""
    made = tmp_path_factory.mktemp("searched")
    write_tiny(made)
    # Random weights end in latents that are far from any picture, where PSNR says little: the gate is a loose one.
    (made / "tiny.toml").write_text(SEARCHED)
    return made


@pytest.fixture(scope="module")
def folder(asked: Path) -> Path:
    """The same, with what a search that was ended by Ctrl-C has left."""
    command = [sys.executable, "-m", "slipcast.cli.main", "compile", "tiny.toml"]
    child = subprocess.Popen(command, cwd=asked, env=os.environ, stderr=subprocess.PIPE, text=True)
    assert child.stderr
    said = []
    for line in child.stderr:
        said.append(line)
        if (found := re.search(r"(\d+) trials", line)) and int(found[1]) >= 3:
            child.send_signal(signal.SIGINT)
            break
    rest = child.stderr.read()
    assert child.wait(timeout=60) == 130, "".join(said) + rest
    assert "finished trials are kept in artifacts/search/tiny-" in rest
    assert "the same command goes on" in rest
    return asked


@slow
def test_what_was_found_is_taken_from_the_journal_and_compiled(folder: Path) -> None:
    (journal,) = folder.glob(f"artifacts/search/tiny-*/{JOURNAL}")
    before = journal.read_text()
    done = call_cli("compile", "tiny.toml", "--set", "search.budget_minutes=0.0001", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "choose by search" not in done.stderr  # the time that was spent counts
    assert {path.name for path in journal.parent.iterdir()} == {JOURNAL, "lock"}
    record = json.loads(done.stdout)
    found = record["search"]
    assert len(found["trials"]) >= 3
    assert journal.read_text().startswith(before)
    first, chosen = found["trials"][0], next(t for t in found["trials"] if t["number"] == found["chosen"])
    assert 0.5 < first["ratio"] < 2  # the recipe against itself
    assert chosen["holds"] and chosen["bounds"]["psnr_worst"] >= 8.0
    assert all(trial["memory_mb"] > 50 and trial["seconds"] > 0 for trial in found["trials"] if "error" not in trial)
    # What is in the bundle is the chosen trial, and is what its --set options say.
    by_hand = make_plan(read_recipe(folder / "tiny.toml", shlex.split(found["arguments"])[1::2]), folder)
    manifest = open_bundle(folder / "artifacts" / "tiny").manifest
    assert manifest.sampling == by_hand.sampling
    assert manifest.reference == by_hand.reference
    ffn = by_hand.recipe.passes.prune_ffn
    assert (manifest.ffn_retention_ratio < 1) == bool(ffn and ffn.ratio)
    assert "search" not in record["recipe"]  # the resolved recipe makes this bundle, and does not search again
    shown = call_cli("report", "artifacts/tiny", cwd=folder).stdout
    assert f"found by search: {found['arguments']}" in shown
    page = (folder / "artifacts" / "tiny" / "report.html").read_text()
    assert '<code id="chosen">' in page and page.count("<circle") >= len(found["front"])


@slow
def test_nothing_holds_the_gate(folder: Path) -> None:
    """A gate that no trial can hold, judged from a journal with one trial."""
    overrides = ("gate.psnr=101", "search.budget_minutes=0.001", 'search.levers=["steps"]')
    plan = make_plan(read_recipe(folder / "tiny.toml", overrides), folder)
    with pytest.raises(CheckFailed, match="(?s)nothing that holds the gate.*trial 0, the nearest"):
        run.choose_by_search(Described(plan), Cache(folder / "artifacts" / "cache"), Stages())


def test_another_recipe_is_another_search_and_another_budget_is_not(asked: Path) -> None:
    def name(*overrides: str) -> str:
        subject = Described(make_plan(read_recipe(asked / "tiny.toml", overrides), asked))
        return run._hash(subject, Space(subject))

    assert name() == name("search.budget_minutes=3")
    assert len({name(), name("search.seed=1"), name("gate.psnr=9"), name("sampling.steps=7")}) == 4


def test_code_that_changes_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    class Evaluator:
        def measure(self, overrides: dict[str, object]) -> dict[str, object]:
            return {}

        judge = measure

    watched = run._Watched(Evaluator())  # type: ignore[arg-type]
    assert watched.measure({}) == {}
    monkeypatch.setattr(closure, "_parse", lambda *_: closure._Parsed("other code", frozenset()))
    with pytest.raises(run.CodeChanged, match="changed during the search"):
        watched.measure({})
