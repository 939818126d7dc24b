"""Originals that another machine draws, and bundles of pipelines that nobody draws with."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slipcast
from conftest import ROOT, call_cli, compile_here, run_here
from slipcast_compiler.pages.record import typed_program_record

sys.path.insert(0, str(ROOT / "tests" / "capture"))
from tiny import open_pipeline

RECIPE = """\
name = "tiny"
model.path = "model"
call = { num_inference_steps = [2, 3], height = 32, width = 32 }
family = { prompts = ["a red circle", "a blue star", "a small circle", "the background"], held_out = 0.5 }
evaluate.out_of_family = ["noon"]
targets = [{ engine = "onnxruntime" }]
"""


NOBODY = ("--set", 'evaluate.original="none"', "--set", "evaluate.out_of_family=[]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    open_pipeline("latent_consistency").save_pretrained(folder / "model")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


def compiled(place: Path, *options: str) -> Any:
    return compile_here("tiny.toml", "--json", *(each for option in options for each in ("--set", option)), cwd=place)


@pytest.fixture(scope="module")
def drawn(place: Path) -> Path:
    """On the other machine."""
    done = run_here("originals", "tiny.toml", "-o", "drawn", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "pictures in fp32, drawn on" in done.stdout
    return place / "drawn"


@pytest.fixture(scope="module")
def here(place: Path) -> dict[str, Any]:
    """What is judged by pictures that are drawn here."""
    done = compiled(place)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_pictures_of_another_machine_judge_as_ones_own(place: Path, drawn: Path, here: dict[str, Any]) -> None:
    done = compiled(place, 'evaluate.originals="drawn"', "gate.psnr=60")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["targets"][0]["quality"] == here["targets"][0]["quality"]
    assert found["targets"][0]["performance"]["latency_full_s"] is None, "its seconds are the other machine's"
    assert found["original_machine"] and not found["variants"][0]["latency_original_s"]
    report = (place / "artifacts" / "tiny" / "report.html").read_text("utf-8")
    assert f"drawn on {found['original_machine']}" in report and report.count("data:image/png") == 3 * 3


def test_a_dry_run_says_who_draws(place: Path, drawn: Path) -> None:
    told = call_cli("compile", "tiny.toml", "--dry-run", "--set", 'evaluate.originals="drawn"', cwd=place)
    assert "originals  in fp32, drawn on" in told.stdout, told.stderr
    told = call_cli("compile", "tiny.toml", "--dry-run", *NOBODY, cwd=place)
    assert "originals  none: the bundle is published as unjudged" in told.stdout, told.stderr


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("call.num_inference_steps=4", "has pictures of other calls"),
        ("evaluate.seed=7", "has pictures of other seeds"),
        ('family.prompts=["a", "b", "c", "d"]', "has pictures of other prompts"),
        ("evaluate.out_of_family=[]", "has pictures of other prompts out of the family"),
        ('evaluate.originals="nowhere"', "was not written by `slipcast originals`"),
        ('evaluate.original="none"', "give at most one of original and originals"),
    ],
)
def test_pictures_of_something_else_are_refused_in_the_plan(
    place: Path, drawn: Path, option: str, problem: str
) -> None:
    options = ("--set", 'evaluate.originals="drawn"', "--set", option)
    done = call_cli("compile", "tiny.toml", "--dry-run", *options, cwd=place)
    assert done.returncode == 2 and problem in done.stderr, done.stderr


def test_a_file_that_was_cut_short_is_refused_in_the_plan(place: Path, drawn: Path) -> None:
    shutil.copytree(drawn, place / "damaged")
    file = place / "damaged" / "family" / "0" / "images.npy"
    file.write_bytes(file.read_bytes()[:-1])
    done = call_cli("compile", "tiny.toml", "--dry-run", "--set", 'evaluate.originals="damaged"', cwd=place)
    assert done.returncode == 2 and "images.npy is not the file that was written" in done.stderr, done.stderr


def test_pictures_of_other_weights_are_refused(place: Path, drawn: Path, tmp_path: Path) -> None:
    pipe = open_pipeline("latent_consistency")
    pipe.unet.conv_in.bias.data += 1
    pipe.save_pretrained(tmp_path / "model")
    sets = ("--set", f'evaluate.originals="{drawn}"', "--set", f'model.path="{tmp_path / "model"}"')
    done = call_cli("compile", "tiny.toml", "--dry-run", *sets, cwd=place)
    assert done.returncode == 2 and "was drawn by another checkpoint" in done.stderr, done.stderr


@pytest.mark.slow
def test_what_nobody_drew_is_published_as_unjudged(
    place: Path, here: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    done = compiled(place, 'evaluate.original="none"', "evaluate.out_of_family=[]")
    assert done.returncode == 0, done.stderr
    record = typed_program_record({k: v for k, v in json.loads(done.stdout).items() if k != "output"})
    assert record.passed is None and record.original_precision is None and not record.targets[0]["quality"]
    assert record.verified_with == "functions"
    bundle = place / "artifacts" / "tiny"
    assert json.loads((bundle / "manifest.json").read_text())["unjudged"] is True
    report = (bundle / "report.html").read_text("utf-8")
    assert "Unjudged: the original was not drawn" in report and "data:image/png" not in report
    assert "unjudged, the original was not drawn" in call_cli("report", str(bundle)).stdout
    caplog.set_level(logging.WARNING, "slipcast")
    with slipcast.load(bundle) as pipe:
        pictures = pipe("a star", seed=1, output_type="np").images
    assert "is unjudged" in caplog.text
    done = compiled(place)
    assert done.returncode == 0, done.stderr
    with slipcast.load(bundle) as pipe:
        # What did not fit into memory takes one image in a call: the same but for the order of sums.
        np.testing.assert_allclose(pipe("a star", seed=1, output_type="np").images, pictures, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("gate.psnr=30", "gate.psnr is against the original"),
        ('evaluate.out_of_family=["noon"]', "evaluate.out_of_family compares with the original"),
    ],
)
def test_comparisons_with_what_nobody_drew_are_refused(place: Path, option: str, problem: str) -> None:
    done = call_cli(
        "compile", "tiny.toml", "--dry-run", "--set", 'evaluate.original="none"', "--set", option, cwd=place
    )
    assert done.returncode == 2 and problem in done.stderr, done.stderr


def test_a_described_pipeline_is_refused(place: Path) -> None:
    (place / "described.toml").write_text(
        RECIPE.replace('"model"', f'"{ROOT / "recipes/models/shapes"}"').replace("call =", "#")
    )
    done = call_cli("originals", "described.toml", "-o", "other", cwd=place)
    assert done.returncode == 2 and "this one is described" in done.stderr, done.stderr


def test_a_picture_that_is_missing_is_refused(place: Path, drawn: Path) -> None:
    """Also where whoever took it away changed the digests."""
    shutil.copytree(drawn, folder := place / "fewer")
    file = folder / "family" / "0" / "images.npy"
    np.save(file, np.load(file)[:0])
    record = json.loads((folder / "originals.json").read_text())
    record["files"]["family/0/images.npy"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "originals.json").write_text(json.dumps(record))
    done = compiled(place, 'evaluate.originals="fewer"')
    assert done.returncode == 2 and "does not have a picture for each seed" in done.stderr, done.stderr
