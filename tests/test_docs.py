"""README and docs: what they show runs as it stands there, links lead somewhere, what is generated is up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes" / "bench"))
import results
import tables

BENCH = ROOT / "recipes" / "bench"


def _load(file: Path) -> ModuleType:
    """A script that is in no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load(ROOT / "docs" / "generate.py")
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SET_UP, TESTS = [text for kind, text in FENCED.findall(README) if kind == "sh"][:2]


def page(name: str) -> str:
    """The text of a page of docs/."""
    return (ROOT / "docs" / name).read_text("utf-8")


# What the pages show: every sh and python block.


def blocks() -> list[object]:
    """(kind, text, quick), page by page, in order; the set-up and test commands apart."""
    found: list[object] = []
    for file in PAGES:
        shown = [block for block in FENCED.findall(file.read_text("utf-8")) if block[0] in ("sh", "python")]
        for number, (kind, text) in enumerate(block for block in shown if block[1] not in (SET_UP, TESTS)):
            # All but what reads recipes alone.
            quick = "artifacts/" not in text and not re.search(
                r"slipcast (?!init|capture|doctor$|.*--dry-run)", text, re.MULTILINE
            )
            found.append(pytest.param(kind, text, quick, id=f"{file.stem}-{number}", marks=pytest.mark.slow))
    return found


@pytest.fixture(scope="module")
def place(workspace: Path) -> Path:
    """The workspace with this interpreter as its .venv."""
    (workspace / ".venv").symlink_to(sys.prefix)
    return workspace


def run(kind: str, script: str, place: Path) -> str:
    """What a block prints; it has to succeed."""
    command = ["bash", "-euc", script] if kind == "sh" else [sys.executable, "-c", script]
    environment = os.environ | {"PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_set_up_runs_the_main_job(place: Path, shapes_bundle: Path) -> None:
    """All but the installation, which CI does for real: it runs the second command to the letter."""
    install, main = SET_UP.split(" && ", 1)[1].split(" && ", 1)
    assert install == ".venv/bin/pip install -c .ci/constraints.txt -e '.[compiler,openvino]'"
    run("sh", main, place)
    assert Image.open(place / "circles.png").size == (196, 196)


def test_ci_runs_the_readmes_test_command() -> None:
    setup, tests = TESTS.strip().rsplit(" && ", 1)
    script = (ROOT / ".ci" / "run").read_text()
    assert f'setup="{setup}"' in script
    assert f'tests="{tests}"' in script


@pytest.mark.parametrize(("kind", "text", "quick"), blocks())
def test_what_is_shown_runs(request: pytest.FixtureRequest, place: Path, kind: str, text: str, quick: bool) -> None:
    if not quick:
        request.getfixturevalue("shapes_bundle")
    if "sdxl" in text:
        save_sdxl(place / "sdxl")
    assert run(kind, text, place).strip()


def save_sdxl(folder: Path) -> None:
    """The checkpoint that docs/capture.md compiles, if it is not there: a tiny one with random weights."""
    if not folder.exists():
        sys.path.append(str(ROOT / "tests" / "capture"))
        from tiny import open_pipeline

        open_pipeline("stable_diffusion_xl").save_pretrained(folder)


@pytest.mark.slow
def test_python_draws_what_it_says(place: Path, shapes_bundle: Path) -> None:
    (text,) = (text for kind, text in FENCED.findall(README) if kind == "python")
    assert "(7, 8, 9, 10) openvino-cpu-bf16" in run("python", text, place)
    assert Image.open(place / "circle.png").size == (64, 64)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_recipes_that_are_shown_are_recipes(file: Path) -> None:
    from slipcast_compiler.recipe.reading import parse_recipe

    whole = (ROOT / "recipes" / "shapes-circles.toml").read_text("utf-8")
    for kind, text in FENCED.findall(file.read_text("utf-8")):
        if kind == "toml":
            shown = re.findall(r"^\[([a-z_.]+)\]", text, re.MULTILINE)
            rest = re.sub(rf"^\[({'|'.join(shown)})\]\n(?:[^\[\n].*\n)*", "", whole, flags=re.MULTILINE)
            parse_recipe(f"{rest}\n{text}", file.name)


# The README keeps its size; links; lists.


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 125
    assert not [line for line in lines if len(line) > 150 and line not in SET_UP]
    headings = re.findall(r"^## (.*)", README, re.MULTILINE)
    assert lines.index("## What it cannot do") < len(lines) / 2, headings


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", text), re.MULTILINE)
    return {generate.slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings}


def links(text: str) -> list[str]:
    """Targets of links and pictures outside of code."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"^\[[^\]]+\]: (\S+)", prose, re.MULTILINE)


@pytest.mark.parametrize("file", LINKING, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(file: Path) -> None:
    text = file.read_text("utf-8")
    for target in links(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = file.parent / path if path else file
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text("utf-8")), target


def test_paths_in_contributing_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = set(re.findall(r"`((?:runtime|compiler|tests|recipes|docs|\.ci)/[\w./-]+)`", text))
    assert len(paths) > 30
    assert [path for path in sorted(paths) if "NAME" not in path and not (ROOT / path).exists()] == []
    assert [path for path in paths if "NAME" in path and not (ROOT / path).parent.exists()] == []
    for how in text.split("\n## How to ")[1:]:
        assert sum(bool(line.strip()) for line in how.splitlines()[1:]) <= 10, how


def test_references_are_defined() -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", README))
    defined = set(re.findall(r"^\[([^\]]+)\]: ", prose, re.MULTILINE))
    used = set(re.findall(r"\[[^\]]*\]\[([^\]]+)\]", prose))
    used |= set(re.findall(r"(?<!\])\[([^\]]+)\](?![\[(:])", prose))
    assert used == defined


def test_every_page_is_linked_from_the_readme() -> None:
    assert {f"docs/{file.name}" for file in PAGES[1:]} <= {target.partition("#")[0] for target in links(README)}


def test_lists_are_complete() -> None:
    from slipcast.engines import ENGINES
    from slipcast.sampling.samplers import SAMPLERS
    from slipcast.sampling.schedules import SCHEDULES
    from slipcast_compiler.bench.peers import PEERS
    from slipcast_compiler.passes import PASSES

    samplers = re.search(r"^Samplers: (.*?)\.\n\n", page("python.md"), re.MULTILINE | re.DOTALL)
    assert samplers
    assert set(re.split(r",\s+", samplers[1])) == set(SAMPLERS)
    schedules = re.search(r"^Schedules: (.*?)\.\n\n", page("python.md"), re.MULTILINE | re.DOTALL)
    assert schedules
    named = set(re.findall(r"\w+", schedules[1]))
    assert set(SCHEDULES) <= named
    peers = re.search(r"^Peers: (.*?) or\s+the\s+path", page("targets.md"), re.MULTILINE | re.DOTALL)
    assert peers
    assert set(re.findall(r"`([^`]+)`", peers[1])) == set(PEERS)
    cells = [line.split("|")[1] for line in page("targets.md").splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} == {"engine", *ENGINES}
    rows = re.findall(r"^\| `(\w+)` \|", page("passes.md"), re.MULTILINE)
    assert rows == list(PASSES)


def test_exit_codes_are_those_of_the_errors() -> None:
    from slipcast import errors

    said = {}
    for code, classes in re.findall(r"^\| (\d+) \| [^|]* \|(.*)\|$", page("bundle.md"), re.MULTILINE):
        said |= dict.fromkeys(re.findall(r"`(\w+)`", classes), int(code))
    known = [each for each in vars(errors).values() if isinstance(each, type) and each.__module__ == errors.__name__]
    assert said == {each.__name__: each.exit_code for each in known if each is not errors.SlipcastError}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_old_words_are_gone(file: Path) -> None:
    text = re.sub(r"artifacts/ablation/\S+", "", file.read_text("utf-8"))  # names of bundles in kept documents
    assert not re.search(r"\[staging\]|\bstaging\b|slipcast study", text)


# Generated parts.


@pytest.mark.parametrize("part", generate.PARTS)
def test_generated_parts_are_what_the_generator_gives(part: str) -> None:
    text = page(generate.PARTS[part][0])
    assert generate.replaced(text, part) == text, "run: python docs/generate.py"


def test_every_table_and_key_is_in_the_reference() -> None:
    from slipcast_compiler.recipe.recipe import Recipe

    text = page("recipe.md")
    for name, field in Recipe.model_fields.items():
        assert f"| `{name}` |" in text
        if found := generate.inner_table(field.annotation):
            head = f"### `[[{name}]]`" if found[1] else f"### `[{name}]`"
            part = text.split(f"{head}\n")[1].split("\n### ")[0]
            assert [key for key in found[0].model_fields if f"| `{key}` |" not in part] == []


# Results: those of the documents that `slipcast bench` wrote, and what is slower is said to be.

RESULTS = page("results.md")
KEPT = {file.stem: json.loads(file.read_text("utf-8")) for file in BENCH.glob("*.json")}
BUILDS = {file.stem: json.loads(file.read_text("utf-8")) for file in (BENCH / "builds").glob("*.json")}
FIRST = {name: document for name, document in KEPT.items() if not name.endswith("-2")}


def table_of(name: str) -> str:
    """What the page has between a table's marks."""
    begin, end = tables.marks(name)
    return RESULTS.split(begin)[1].split(end)[0]


def section(name: str) -> str:
    """The page's text about one comparison."""
    return RESULTS.split(f"### {results.TITLES[name]}\n")[1].split("\n### ")[0].split(results.END)[0]


def test_results_were_written_from_the_kept_documents() -> None:
    assert results.replaced(RESULTS) == RESULTS, "run: python recipes/bench/results.py"
    assert set(FIRST) <= set(results.TITLES)
    assert {name.removesuffix("-2") for name in KEPT} == set(FIRST)


def test_the_readmes_figures_are_those_of_the_documents() -> None:
    search, plain, large = (FIRST[name] for name in ("shapes-circles-search", "shapes-circles", "sd15-shaped-512"))
    lines = [line for line in README.splitlines() if line.startswith("| [")]
    speed, memory, heads, int8, int4, slower = lines
    assert f"{search['ratios']['diffusers']['median']:.1f} times diffusers" in speed
    assert f"{search['ratios']['ddpm1000']['median']:.0f} times DDPM" in speed
    for document in (plain, large):
        assert f"{document['sides']['bundle']['peak_memory_mb']:.0f} MB" in memory
    assert f"{plain['sides']['diffusers']['peak_memory_mb']:.0f} MB" in memory
    assert f"{large['sides']['diffusers-bf16']['peak_memory_mb']:.0f} MB" in memory
    study = (ROOT / "recipes" / "study" / "heads.md").read_text("utf-8")
    shares = re.findall(r"^- \*\*(\w+)\*\*: (\d+)% of the heads, .*?sure: (\d+)%", study, re.MULTILINE | re.DOTALL)
    assert [sure for *_, sure in shares] == ["60", "40", "40"]
    assert {most for _, most, _ in shares} == {"60"}
    assert "60 % of attention heads" in heads
    assert "one family of three, else 40 %" in heads
    denoisers = json.loads((BENCH / "denoisers" / "sd15-int8.json").read_text("utf-8"))["sides"]
    assert f"{denoisers['int8']['ratio']['median']:.2f} times as fast" in int8
    assert denoisers["int8"]["file_mb"] / denoisers["bf16"]["file_mb"] == pytest.approx(0.5, abs=0.01)
    sides = FIRST["flux-shaped-int4"]["sides"]
    own, other = sides["bundle"], sides["artifacts/flux-shaped"]
    gigabytes = [f"{side['peak_memory_mb'] / 1000:.1f}" for side in (own, other)]
    assert f"{gigabytes[0]} GB at the peak where bf16 takes {gigabytes[1]}" in int4
    for name, size in (("shapes-circles", 64), ("sd15-shaped-256", 256), ("sd15-shaped-512", 512)):
        ratio = FIRST[name]["ratios"]["optimum-openvino-static"]["median"]
        assert re.search(rf"{ratio:.2f} (of a bundle's time )?at {size}x{size}", slower)
    for document in (search, plain, large):
        assert (document["host"]["processor"], document["host"]["cores"]) == ("AMD EPYC", 2)


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
