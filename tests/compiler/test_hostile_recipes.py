"""Recipes that are large, deep, wrong or hostile (rows 51 and 56 of the faults): told at once, and before any work."""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_plan import planned

from conftest import call_cli
from slipcast.errors import RecipeError
from slipcast_compiler.judge.scorer import find_scorer
from slipcast_compiler.recipe.family import MOST_PROMPTS, expand, read_prompts
from slipcast_compiler.recipe.reading import key_lines, parse_recipe, read_recipe
from slipcast_compiler.recipe.recipe import FamilyTable

HEAD = 'name = "x"\nmodel.path = "m"\ntargets = [{ engine = "onnxruntime" }]\n'
ROOT = Path(__file__).resolve().parents[2]


def refused(text: str, *overrides: str) -> str:
    """What is said, within seconds."""
    begin = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.toml", overrides)
    assert time.perf_counter() - begin < 10
    assert caught.value.exit_code == 2
    return str(caught.value)


class TestManyLines:
    def test_a_typo_among_ten_thousand_prompts(self) -> None:
        prompts = [f'  "a red circle number {i}",\n' for i in range(10_000)]
        prompts[7_000] = "  7,\n"
        said = refused(f"{HEAD}[family]\nheld = 0.3\nprompts = [\n{''.join(prompts)}]\n")
        assert "r.toml:5: family.held: unknown key 'held', did you mean 'held_out'?" in said
        assert "r.toml:7007: family.prompts[7000]: input should be a valid string, got 7" in said

    def test_a_typo_after_ten_thousand_lines(self) -> None:
        slots = "".join(f'"s{i}",\n' for i in range(10_000))
        said = refused(f"{HEAD}[family]\ntemplates = ['a {{s}}']\nslots.s = [\n{slots}]\n[sampling]\nstps = 4\n")
        assert "r.toml:10009: sampling.stps: unknown key 'stps', did you mean 'steps'?" in said

    def test_ten_thousand_problems_are_told_by_some(self) -> None:
        said = refused(f"{HEAD}family.prompts = [\n{'1,' * 10_000}]\n")
        assert "10000 problems in the recipe" in said
        assert said.endswith("and 9950 more")

    @pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda file: file.name)
    def test_lines_are_those_of_the_parser(self, file: Path) -> None:
        """A key stands on the first line of the shortest beginning, of whole statements, that has it."""
        text = file.read_text("utf-8")
        found, lines, start = key_lines(text), text.splitlines(), 0
        wanted: dict[Any, int] = {}
        for end in range(1, len(lines) + 1):
            while start < end - 1 and (not lines[start].strip() or lines[start].lstrip().startswith("#")):
                start += 1
            try:
                document = tomllib.loads("\n".join(lines[:end]))
            except tomllib.TOMLDecodeError:
                continue
            for location in locations(document):
                wanted.setdefault(location, start + 1)
            start = end
        assert wanted.keys() == found.keys()
        for location, line in found.items():
            assert line == wanted[location] or (isinstance(location[-1], int) and line > wanted[location]), location

    def test_lines_in_odd_notations(self) -> None:
        text = (
            '"a b".\'c.d\' = 1 # [x]\nf = """one\n]\n""" \ng = [ [1, 2], # ]\n  { h = "}", i = [3] },\n]\n'
            "j = 1979-05-27 07:32:00\nk = 1.5\n[[l.m]]\nn = 1\n[l.m.o]\np = 1\n[[l.m]]\n[l.m.o]\np = 2\n"
        )
        found = key_lines(text)
        assert set(found) == set(locations(tomllib.loads(text)))
        assert [found[key] for key in (("a b", "c.d"), ("f",), ("g", 0, 1), ("g", 1, "i", 0), ("j",), ("k",))] == [
            1,
            2,
            5,
            6,
            8,
            9,
        ]
        assert [found["l", "m", i, "o", "p"] for i in (0, 1)] == [13, 16]


def locations(value: Any, at: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from locations(inner, (*at, key))


DEEP, NUL = "[" * 5000 + "]" * 5000, "NUL in a text"
UNUSABLE: dict[str, tuple[str, str]] = {
    "deep arrays": (f"x = {DEEP}", "nested too deeply"),
    "deep tables": (f"x = {'{ a = ' * 3000}1{' }' * 3000}", "nested too deeply"),
    "deep enough": (f"x = {'[' * 60}{']' * 60}", "more than 32 tables and arrays in each other"),
    "a dotted key": ("a" + ".a" * 60 + " = 1", "more than 32 tables and arrays in each other"),
    "5,000 digits": (f"sampling.steps = {'9' * 5000}", "not valid TOML"),
    "NUL in a path": ('family.prompts_file = "a\\u0000b"', f"r.toml:4: family.prompts_file: {NUL}"),
    "NUL in a prompt": ('family.prompts = ["a",\n "a\\u0000b"]', f"r.toml:5: family.prompts[1]: {NUL}"),
    "10^12 images": ("evaluate.images = 1_000_000_000_000", "less than or equal to 100000"),
    "10^12 trajectories": ("timesteps.prompts = 1_000_000_000_000", "less than or equal to 100000"),
    "10^30 pixels": (f"sampling = {{ width = {10**15}, height = {10**15} }}", "less than or equal to 16384"),
    "an endless budget": ("search.budget_minutes = inf", "finite number"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable(what: str) -> None:
    line, says = UNUSABLE[what]
    assert says in refused(HEAD + line)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.path=a\0b", f"--set model.path=a\0b: model.path: {NUL}"),
        (f"sampling.steps={'9' * 5000}", "sampling.steps: input should be a valid integer"),
        (f"sampling.steps={DEEP}", "sampling.steps: input should be a valid integer"),
    ],
    ids=["NUL", "digits", "deep"],
)
def test_unusable_overrides(override: str, says: str) -> None:
    assert says in refused(HEAD + 'family.prompts = ["a", "b"]\n', override)


class TestTemplates:
    def test_too_many_combinations_are_not_made(self, tmp_path: Path) -> None:
        slots = {f"s{i}": tuple(f"v{j}" for j in range(9)) for i in range(10)}
        table = FamilyTable(templates=("a dog", " ".join(f"{{{slot}}}" for slot in slots)), slots=slots)
        begin = time.perf_counter()
        with pytest.raises(
            RecipeError, match=rf"at most {MOST_PROMPTS} .*\n.*{9**10 + 1}, of them {9**10} by '\{{s0\}}"
        ):
            expand(table, "x", tmp_path)
        assert time.perf_counter() - begin < 0.5

    def test_a_slot_that_is_used_twice_counts_once(self, tmp_path: Path) -> None:
        table = FamilyTable(templates=("{a} and {a}",), slots={"a": tuple(map(str, range(1000)))})
        assert len(expand(table, "x", tmp_path).calibration) == 800


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "fifo": (os.mkfifo, "not a plain file"),
    "directory": (os.mkdir, "a directory"),
    "endless": (lambda path: os.symlink("/dev/zero", path), "not a plain file"),
    "huge": (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "at most 67108864 are read"),
    "latin": (lambda path: path.write_bytes(b"caf\xe9\n"), "p.txt:1: not UTF-8"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_list_of_prompts(kind: str, tmp_path: Path) -> None:
    make, says = FILES[kind]
    make(tmp_path / "p.txt")
    with pytest.raises(RecipeError, match=says):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_what_is_no_recipe(kind: str, tmp_path: Path) -> None:
    FILES[kind][0](tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="cannot be read(.|\n)*not a plain file"):
        read_recipe(tmp_path / "r.toml")


class TestScorer:
    """A dry run says so where there is none."""

    @pytest.mark.parametrize("name", ["models/clip", "openai/clip-vit-base-patch32", "../x", "/nowhere/clip"])
    def test_neither_there_nor_named_with_a_revision(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"evaluate\.scorer does not exist(.|\n)*@"):
            find_scorer(name, tmp_path)
        with pytest.raises(RecipeError, match=r"evaluate\.scorer does not exist"):
            planned(tmp_path, f'evaluate.scorer = "{name}"')

    def test_a_hub_id_with_a_revision(self, tmp_path: Path) -> None:
        assert find_scorer("openai/clip-vit-base-patch32@3d74acf9", tmp_path) == "openai/clip-vit-base-patch32@3d74acf9"

    def test_pickled_weights_alone(self, tmp_path: Path) -> None:
        (tmp_path / "clip").mkdir()
        (tmp_path / "clip" / "config.json").write_text("{}")
        (tmp_path / "clip" / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(RecipeError, match=r"no weights(.|\n)*safetensors(.|\n)*pytorch_model\.bin"):
            find_scorer("clip", tmp_path)


def test_the_command_says_2_and_one_document(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompts.txt")
    (tmp_path / "r.toml").write_text(
        f'name = "x"\nmodel.path = "{ROOT}/recipes/models/shapes"\ntargets = [{{ engine = "onnxruntime" }}]\n'
        'family.prompts_file = "prompts.txt"\n'
    )
    done = call_cli("compile", "r.toml", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "no list of prompts" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr
