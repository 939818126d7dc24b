"""`slipcast bench` for real, on few images and steps."""

from __future__ import annotations

import copy
import json
import re
import sys
from operator import truediv
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, run_cli
from slipcast.progress import Stages
from slipcast.timing import memory
from slipcast_compiler.bench import plots
from slipcast_compiler.bench.document import parse_document, typed_document
from slipcast_compiler.bench.measure import ROUNDS, measure
from slipcast_compiler.bench.pages import render_page
from slipcast_compiler.bench.plan import BUNDLE, BenchPlan, Options, Side, make_plan
from slipcast_compiler.bench.summary import make_document
from slipcast_compiler.bench.table import render_table

pytestmark = pytest.mark.slow  # whole commands, again and again

SHAPES = ROOT / "recipes" / "models" / "shapes"
HOSTILE = '<script>document.title="owned"</script> "&[bold]'


@pytest.fixture(scope="module")
def document(shapes_bundle: Path, workspace: Path) -> dict[str, Any]:
    """The bundle against diffusers and against itself, two images and two steps."""
    done = run_cli(
        "bench", "artifacts/shapes-circles", "--model", str(SHAPES), "--against", "diffusers,artifacts/shapes-circles",
        "--images", "2", "--steps", "2", "--batch", "1,2", "-o", "out/bench.json", "--json", cwd=workspace,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    assert printed.pop("files") == {"json": "out/bench.json", "html": "out/bench.html"}
    assert printed == json.loads((workspace / "out" / "bench.json").read_text("utf-8"))
    return printed


def test_every_side_has_every_figure(document: dict[str, Any]) -> None:
    assert list(document["sides"]) == [BUNDLE, "diffusers", "artifacts/shapes-circles"]
    for side in document["sides"].values():
        assert side["images"] == len(side["seconds"]["all"]) == 2
        assert side["seconds"]["min"] <= side["seconds"]["median"] <= side["seconds"]["max"]
        assert set(side["images_per_second"]) == {"1", "2"}
        assert side["first_image_s"]["cold"] > side["load_s"] > 0
        assert side["first_image_s"]["warm"] == side["warm_up_s"][0]
        assert side["components_s"]["denoiser"] > side["components_s"]["elsewhere"] >= 0
        assert side["disk_mb"] > 10
        assert side["about"]["steps"] == 2
    assert document["missing"] == document["failed"] == {}
    assert document["compile_s"] > 1
    assert set(document["break_even"]) == {"diffusers", "artifacts/shapes-circles"}


def test_ratios_are_of_the_pairs(document: dict[str, Any]) -> None:
    ours, theirs = (document["sides"][name]["seconds"]["all"] for name in (BUNDLE, "diffusers"))
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    for key, value in (("min", min(pairs)), ("max", max(pairs)), ("median", sum(pairs) / 2)):
        assert document["ratios"]["diffusers"][key] == pytest.approx(value, rel=0.05)
    assert document["memory_ratios"]["diffusers"]["median"] > 1.3  # torch is in it
    assert document["memory_ratios"]["artifacts/shapes-circles"]["median"] == pytest.approx(1, abs=0.1)
    assert set(document["batch_ratios"]["diffusers"]) == {"2"}


def test_ddpm_is_extrapolated_from_what_diffusers_took(document: dict[str, Any]) -> None:
    found, side = document["extrapolated"]["ddpm1000"], document["sides"]["diffusers"]
    parts = side["components_s"]
    others = sum(parts.values()) - parts["denoiser"]
    assert found["evaluations"] == 2
    assert found["seconds"] == pytest.approx(500 * parts["denoiser"] + others, rel=0.1)
    assert any(note.startswith("ddpm1000, not run, would take") for note in document["notes"])


def test_same_noise_same_pictures(document: dict[str, Any]) -> None:
    quality = {name: side["quality"] for name, side in document["sides"].items()}
    assert quality["diffusers"]["psnr_mean"]["value"] == 100.0
    assert quality[BUNDLE]["psnr_mean"]["low"] > 35
    assert quality[BUNDLE] == quality["artifacts/shapes-circles"]  # which are bit-equal
    assert abs(quality[BUNDLE]["clip_delta_mean"]["value"]) < 0.1


def test_table_names_every_side_and_figure(document: dict[str, Any]) -> None:
    text = render_table(document)
    for name, side in document["sides"].items():
        assert name in text
        assert f"{side['seconds']['median']:.3f}" in text
    missing = document | {"missing": {"torch-compile": {"reason": "needs torch", "install": "pip install [x]"}}}
    assert "missing  torch-compile: needs torch; pip install [x]" in render_table(missing)


def test_page_is_self_contained_and_escaped(document: dict[str, Any], workspace: Path) -> None:
    text = (workspace / "out" / "bench.html").read_text("utf-8")
    assert not re.search(r"https?://|<script|<link|<iframe", text)
    for part in ("scatter", "memory", "components", "sides", "quality"):
        assert f'id="{part}"' in text
    hostile = copy.deepcopy(document)
    hostile["name"] = HOSTILE
    hostile["sides"] = {name.replace("artifacts", HOSTILE): side for name, side in hostile["sides"].items()}
    hostile["failed"], hostile["notes"] = {HOSTILE: HOSTILE}, [HOSTILE]
    page = render_page(typed_document(hostile))
    assert "<script>" not in page
    assert "&lt;script&gt;document.title" in page
    assert HOSTILE in render_table(hostile)


def test_break_even_curve_crosses_where_the_count_says(document: dict[str, Any]) -> None:
    one = copy.deepcopy(document)
    one["compile_s"], one["break_even"] = 100.0, {"diffusers": 200}
    one["sides"] = {name: one["sides"][name] for name in (BUNDLE, "diffusers")}
    one["sides"][BUNDLE]["seconds"]["median"], one["sides"]["diffusers"]["seconds"]["median"] = 0.5, 1.0
    curve = plots.break_even(typed_document(one))
    assert curve
    drawn = re.findall(r'<g class="\w+"><path class="line" d="M(\S+) (\S+)L(\S+) (\S+)"', curve)
    ours, theirs = (tuple(map(float, line)) for line in drawn)

    def height(line: tuple[float, ...], x: float) -> float:
        return line[1] + (line[3] - line[1]) * (x - line[0]) / (line[2] - line[0])

    x = ours[0] + (ours[2] - ours[0]) / 1.3
    assert height(ours, x) == pytest.approx(height(theirs, x), abs=0.5)
    assert plots.break_even(typed_document(one | {"break_even": {"diffusers": None}})) is None


@pytest.mark.parametrize("kept", sorted((ROOT / "recipes" / "bench").glob("*.json")), ids=lambda file: file.stem)
def test_kept_documents_are_of_the_format(kept: Path) -> None:
    text = kept.read_text("utf-8")
    document = parse_document(text)
    assert document.plain() == json.loads(text)
    assert typed_document(json.loads(text)) == document
    assert render_table(document.plain())
    assert render_page(document)


def _plan(shapes_bundle: Path, tmp_path: Path, side: str) -> BenchPlan:
    """The bundle against a side of the test's own, and against itself."""
    file = tmp_path / "side.py"
    file.write_text(side)
    plan = make_plan(shapes_bundle, Options((str(shapes_bundle),), images=3, steps=1, batches=(1, 2)))
    fake = Side("fake", "a fake", sys.executable, {"side": str(file)}, images=1, batches=False)
    return BenchPlan(**{**vars(plan), "sides": (plan.sides[0], fake, plan.sides[1])})


def test_a_peer_that_fails_is_named_and_the_rest_goes_on(shapes_bundle: Path, tmp_path: Path) -> None:
    plan = _plan(shapes_bundle, tmp_path, "def open_side(job):\n    raise ValueError('no such model')\n")
    results = measure(plan, Stages())
    document = make_document(plan, results, None)
    assert list(document.ratios) == [str(shapes_bundle)]
    assert "ValueError: no such model" in document.failed["fake"]
    assert "fake: ValueError" in render_table(document.plain())
    assert [len(drawn) for drawn in results.measured[BUNDLE].batches.values()] == [ROUNDS]


def test_a_peer_that_cannot_be_exported_is_named_and_never_started(shapes_bundle: Path, tmp_path: Path) -> None:
    plan = _plan(shapes_bundle, tmp_path, "def prepare(job):\n    raise ValueError('no such operator')\n")
    unexported = Side("fake", "a fake", sys.executable, plan.sides[1].job, prepared=tmp_path / "exports" / "fake")
    results = measure(BenchPlan(**{**vars(plan), "sides": (plan.sides[0], unexported)}), Stages())
    assert "ValueError: no such operator" in results.failed["fake"]
    assert list(results.measured) == [BUNDLE]
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_slow_peer_makes_fewer_images_and_says_so(shapes_bundle: Path, tmp_path: Path) -> None:
    side = """
import numpy as np
def open_side(job):
    return lambda prompts, seeds: (np.zeros((len(seeds), 64, 64, 3)), None)
def describe():
    return {"steps": 1000}
"""
    plan = _plan(shapes_bundle, tmp_path, side)
    document = make_document(plan, measure(plan, Stages()), None)
    fake = document.sides["fake"]
    assert fake.images == document.ratios["fake"].pairs == 1
    assert fake.images_per_second.keys() == {"1"}
    assert fake.components_s is None
    assert {"fake ran on 1 of 3 images", "fake ran one image at a time only"} <= set(document.notes)
    assert "fake" not in document.batch_ratios
    render_page(document)


def test_where_memory_is_short_each_peer_is_alone_with_the_bundle(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = f"""
import os, pathlib
import numpy as np
alive = pathlib.Path({str(tmp_path)!r})
def open_side(job):
    assert not list(alive.glob("alive-*")), "another peer is in memory"
    mark = alive / f"alive-{{os.getpid()}}"
    mark.touch()
    import atexit
    atexit.register(mark.unlink)
    return lambda prompts, seeds: (np.zeros((len(seeds), 64, 64, 3)), None)
def describe():
    return {{"steps": 1}}
"""
    plan = _plan(shapes_bundle, tmp_path, side)
    peers = [Side(name, name, sys.executable, plan.sides[1].job) for name in ("first", "second")]
    plan = BenchPlan(**{**vars(plan), "sides": (plan.sides[0], *peers)})
    monkeypatch.setattr(memory, "available_mb", lambda: 1e9)
    assert "AssertionError: another peer is in memory" in measure(plan, Stages()).failed["second"]
    for file in tmp_path.glob("alive-*"):
        file.unlink()
    monkeypatch.setattr(memory, "available_mb", lambda: 1e3)
    results = measure(plan, Stages())
    assert results.failed == {}
    assert set(results.measured) == {BUNDLE, "first", "second"}
    assert results.beside["first"] is not results.beside["second"]
    assert [len(results.beside[name].drawn) for name in ("first", "second")] == [3, 3]
    document = make_document(plan, results, None)
    assert document.bundle.images == 6
    theirs, ours = results.measured["second"].seconds, results.beside["second"].seconds
    assert document.ratios["second"].min == pytest.approx(min(map(truediv, theirs, ours)), abs=1e-4)
    assert len(results.measured[BUNDLE].batches[2]) == 2 * ROUNDS
    assert any(note.startswith("every peer ran in turn with the bundle alone: 3 sides") for note in document.notes)


def test_the_documents_command_repeats_it(document: dict[str, Any]) -> None:
    assert document["command"] == (
        f"slipcast bench artifacts/shapes-circles --model {SHAPES} --against diffusers,artifacts/shapes-circles "
        "--images 2 --batch 1,2 --steps 2"
    )


def test_the_page_leads_to_the_bundles_report(workspace: Path, document: dict[str, Any]) -> None:
    links = re.findall(r'href="([^"]*)"', (workspace / "out" / "bench.html").read_text("utf-8"))
    assert [(workspace / "out" / link).resolve() for link in links] == [
        (workspace / "artifacts" / "shapes-circles" / "report.html").resolve()
    ]
    assert "href" not in render_page(typed_document(document))


def test_usage_errors_have_exit_code_2(shapes_bundle: Path) -> None:
    for options in (["--batch", "1,x"], ["--images", "0"], ["--against", "nobody"], ["-o", "."], ["-o", "a.html"]):
        done = run_cli("bench", str(shapes_bundle), *options)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
