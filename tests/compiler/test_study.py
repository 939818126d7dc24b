"""A small study of the reference model from end to end: killed, gone on with, and read back."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from slipcast.errors import ArtifactError

sys.path.insert(0, str(ROOT / "recipes" / "study"))
from heads import run
from heads.cases import make_study
from heads.page import render
from heads.recipe import parse_study
from test_study_recipe import SMALL, STUDY

SCRIPT = STUDY / "heads.py"
KEPT = [file.with_suffix(".json") for file in sorted(STUDY.glob("*.toml")) if file.with_suffix(".json").exists()]
RECOVER = "\n[recover]\nratios = [0.5]\nsteps = 1\n"
ONE = re.sub(r"\[families.stars\]\n.*\n.*\n|stars = .*\n", "", SMALL) + RECOVER  # one family

slow = pytest.mark.slow  # a study of two minutes, killed and gone on with


def run_script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """heads.py as a user starts it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900)


def _entries(cache: Path) -> dict[str, tuple[int, int]]:
    """Name of each complete entry of a case or profile -> its record's inode and time."""
    found = [*cache.glob("study-*/entry.json"), *cache.glob("profile-*/entry.json")]
    return {file.parent.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(folder, the cache's entries when the first run was killed, those when the second had finished)."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "small.toml").write_text(ONE)
    command = [sys.executable, str(SCRIPT), "small.toml", "-o", "out", "--cache", "cache"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(list((folder / "cache").glob("study-*/entry.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the process that judges goes with it
    assert not list((folder / "out").glob("*"))
    before = _entries(folder / "cache")
    done = run_script("small.toml", "-o", "out", "--cache", "cache", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert str(Path("out", "small.md")) in done.stdout.splitlines()
    assert "random, no calibration, seed 20" in done.stderr  # what is being judged is said
    return folder, before, _entries(folder / "cache")


@pytest.fixture(scope="module")
def document(finished: tuple[Path, Any, Any]) -> dict[str, Any]:
    return run.read(finished[0] / "out" / "small.json")


@slow
def test_a_killed_study_repeats_no_case(finished: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, before, after = finished
    assert len(before) < len(after)
    assert before.items() <= after.items()


@slow
def test_all_masks_of_a_ratio_remove_the_same_number_of_heads(document: dict[str, Any]) -> None:
    total = sum(document["heads"].values())
    assert total == 160
    for record in document["records"]:
        assert int(record["removed"], 16).bit_count() == round(record["ratio"] * total)
    masks = {r["removed"] for r in document["records"] if r["criterion"] == "random" and r["ratio"] == 0.5}
    assert len(masks) == 2
    masks = {r["removed"] for r in document["records"] if r["criterion"] == "magnitude" and r["ratio"] == 0.5}
    assert len(masks) == 1


@slow
def test_pictures_are_those_of_pruned_models(document: dict[str, Any]) -> None:
    """More heads gone is farther from the unpruned model, and what is recovered is another model."""

    def psnr(criterion: str, ratio: float, recovered: bool = False) -> float:
        found = [
            value for r in document["records"] for name, each in r["sets"].items() for value in each["psnr"]
            if (r["criterion"], r["ratio"], r["recovered"]) == (criterion, ratio, recovered) and "held_out" in name
        ]  # fmt: skip
        return sum(found) / len(found)

    for criterion in ("leave_one_out", "magnitude"):
        assert 100 > psnr(criterion, 0.3) > psnr(criterion, 0.5) > 0
    assert psnr("leave_one_out", 0.5, True) != psnr("leave_one_out", 0.5)
    scores = [s for of in document["originals"].values() for seed in of.values() for s in seed]
    assert len(set(scores)) > 10
    assert max(map(abs, scores)) <= 1


@slow
def test_ranks_order_the_heads_that_go(document: dict[str, Any]) -> None:
    """Of each layer that keeps more than the floor, the heads that went rank below those that stayed."""
    for record in document["records"]:
        if record["criterion"] != "leave_one_out" or record["recovered"]:
            continue
        ranks = document["ranks"]["leave_one_out"][record["calibration"]][str(record["seed"])]
        assert sorted(ranks) == list(range(160))
        gone = [bit == "1" for bit in f"{int(record['removed'], 16):0160b}"]
        for first in range(0, 160, 8):
            layer = list(zip(gone[first : first + 8], ranks[first : first + 8], strict=True))
            out, stay = [r for g, r in layer if g], [r for g, r in layer if not g]
            assert stay
            assert not out or max(out) < min(stay)


@slow
def test_the_report_is_written_again_from_the_document(finished: tuple[Path, Any, Any]) -> None:
    folder = finished[0] / "out"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"small.json", "small.md", "small-clip.svg", "small-psnr.svg"} <= set(before)
    assert b"After recovery" in before["small.md"] and b"that were tried with it:" in before["small.md"]
    (folder / "small.md").write_text("not it")
    done = run_script("out/small.json", cwd=finished[0])
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@slow
def test_the_dry_run_says_how_long(finished: tuple[Path, Any, Any]) -> None:
    done = run_script("small.toml", "--dry-run", cwd=finished[0])
    assert done.returncode == 0, done.stderr
    said = run.estimate(make_study(parse_study(ONE, "small.toml"), finished[0]))
    assert done.stdout.startswith(run.in_words(said).split("\n")[0])
    assert (said["cases"], said["profiles"], said["recoveries"]) == (18, 4, 2)
    # Of a seed: at both ratios 6 of the family's mask and of the generic one, and 2 of both that read weights alone;
    # 4 of the recovered one, and 6 of the unpruned model.
    assert said["images"] == 2 * (2 * (6 + 6 + 2 * 2) + 4) + 2 * 6
    assert all(seconds > 0 for seconds in said["seconds"].values())


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "slipcast-bench/1"}'])
def test_what_is_no_study_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ArtifactError):
        run.read(tmp_path / "other.json")


def test_a_refusal_has_its_code(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{")
    assert run_script(str(tmp_path / "other.json")).returncode == 4


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "file").write_text("")
    done = run_script("small.toml", "-o", "file", "--cache", "cache", cwd=tmp_path)
    assert done.returncode == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kept", KEPT, ids=lambda file: file.stem)
def test_the_kept_report_is_that_of_its_document(kept: Path) -> None:
    document = run.read(kept)
    made = render(document)
    assert {name: (kept.parent / name).read_text("utf-8") for name in made} == made
    assert {file.name for file in kept.parent.glob(f"{kept.stem}-*.svg")} | {f"{kept.stem}.md"} == set(made)
    text = kept.read_text("utf-8")
    assert not any(place in text for place in ('"/', "/home/", "/tmp/"))
