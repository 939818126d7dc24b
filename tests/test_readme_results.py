"""The README's results are those of the documents that `slipcast bench` wrote, and what is slower is said to be."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes" / "bench"))
import results
import tables

BENCH = ROOT / "recipes" / "bench"
README = (ROOT / "README.md").read_text("utf-8")
KEPT = {file.stem: json.loads(file.read_text("utf-8")) for file in BENCH.glob("*.json")}
BUILDS = {
    file.stem: json.loads(file.read_text("utf-8")) for file in (ROOT / "recipes" / "bench" / "builds").glob("*.json")
}
FIRST = {name: document for name, document in KEPT.items() if not name.endswith("-2")}


def table_of(name: str) -> str:
    """What the README has between a table's marks."""
    begin, end = tables.marks(name)
    return README.split(begin)[1].split(end)[0]


def section(name: str) -> str:
    """The README's text about one comparison."""
    return README.split(f"#### {results.TITLES[name]}\n")[1].split("\n#### ")[0].split(results.END)[0]


def test_the_readme_was_written_from_the_kept_documents() -> None:
    assert results.replaced(README) == README, "run recipes/bench/results.py"
    assert set(FIRST) <= set(results.TITLES)
    assert {name.removesuffix("-2") for name in KEPT} == set(FIRST)


@pytest.mark.parametrize("name", FIRST)
def test_every_side_has_its_figures(name: str) -> None:
    document, text = FIRST[name], section(name)
    rows = re.findall(r"^\| `([^`]+)`.*$", text, re.MULTILINE)
    assert rows == list(document["sides"])
    for side, figures in document["sides"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{side}`"))
        assert f"| {figures['seconds']['median']:.3f} |" in row
        assert f"| {figures['peak_memory_mb']:.0f}" in row
        if side in document["ratios"]:
            ratio = document["ratios"][side]
            assert f"| {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |" in row
    assert document["date"][:10] in text
    assert f"$ {document['command']}\n" in text
    assert "--make-venvs" not in document["command"]
    assert document["missing"] == document["failed"] == {}


@pytest.mark.parametrize("name", FIRST)
def test_it_is_said_where_a_peer_is_better(name: str) -> None:
    document = FIRST[name]
    expected = {"Faster than the bundle": document["ratios"], "Smaller in memory": document["memory_ratios"]}
    for size in document["settings"]["batches"]:
        if size > 1:
            of = {peer: ratios[str(size)] for peer, ratios in document["batch_ratios"].items()}
            expected[f"In batches of {size}"] = of
    text = " ".join(section(name).split())
    for said, ratios in expected.items():
        found = re.search(rf"{said}: (.*?)\.", text)
        assert found
        assert set(re.findall(r"`([^`]+)`", found[1])) == {p for p, ratio in ratios.items() if ratio["median"] < 1}


def test_a_second_run_is_compared(tmp_path: Path) -> None:
    first = FIRST["shapes-circles"]
    assert "not known" in results.agreement(first, None)
    again = json.loads(json.dumps(first))
    again["ratios"]["torch-compile"]["median"] *= 0.93
    assert "at most 7.0% (`torch-compile`)" in results.agreement(first, again)
    for name, document in (("shapes-circles", first), ("shapes-circles-2", again)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    assert "at most 7.0%" in results.results(tmp_path)


def test_what_was_not_measured_is_named_and_tables_fit_the_document() -> None:
    document = json.loads(json.dumps(FIRST["shapes-circles"]))
    document["missing"], document["settings"]["batches"] = {"diffusers": {"reason": "", "install": None}}, [1]
    for side in document["sides"].values():
        side["images_per_second"], side["quality"] = {"1": 1.0}, None
    text = results.section("shapes-circles", "title", document, None)
    assert "Not measured: `diffusers`." in text
    assert "CLIP" not in text
    assert "In batches" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize("name", BUILDS)
def test_every_build_has_its_figures(name: str) -> None:
    document, table = BUILDS[name], table_of("builds")
    rows = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    assert len(document["builds"]) == len(tables.GPUS) * len(rows)
    for made in document["builds"]:
        precision = "int8 and fp16" if made["precision"] == "int8" else made["precision"]
        row = next(line for line in rows if f"| `{made['component']}` | {precision} |" in line)
        assert f"| {made['seconds']:.0f}, {made['peak_memory_mb']:.0f}, {made['engine_mb']:.1f} |" in row
    assert f"$ {document['command']}\n" in table
    assert document["date"][:10] in table


def test_models_have_their_rows() -> None:
    document, table = json.loads((BENCH / "cuts" / "published.json").read_text("utf-8")), table_of("cuts")
    assert set(document["denoisers"]) == set(tables.MODELS)
    for name, found in document["denoisers"].items():
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {tables.MODELS[name]} |"))
        for stage in found["parts"].values():
            assert f"| {stage['nodes']} nodes, {stage['parameters'] / 1e6:.1f} M |" in row
        assert sum(stage["parameters"] for stage in found["parts"].values()) == pytest.approx(
            found["original"]["parameters"], rel=1e-3
        )


def test_forms_of_a_graph_have_their_rows() -> None:
    document, table = json.loads((BENCH / "hygiene" / "shapes-circles.json").read_text("utf-8")), table_of("hygiene")
    for engine, forms in document["targets"].items():
        for form, found in forms.items():
            (row,) = (line for line in table.splitlines() if line.startswith(f"| {engine} ") and f"| {form} |" in line)
            assert f"| {document['nodes'][form]} | {found['layers']} | {found['seconds']['median'] * 1e3:.1f} |" in row


def test_denoisers_have_their_rows() -> None:
    document, table = json.loads((BENCH / "denoisers" / "sd15-int8.json").read_text("utf-8")), table_of("denoisers")
    for name, side in document["sides"].items():
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        ratio = side["ratio"]
        assert (
            f"| {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | {side['paper_ratio']:.2f} |" in row
        )


def test_the_documents_hold_no_paths_of_a_machine() -> None:
    assert set(BUILDS) <= set(tables.BUILDS)
    for document in (*KEPT.values(), *BUILDS.values()):
        assert not re.search(r'[ "=]/|/home/|/tmp/', json.dumps(document))
