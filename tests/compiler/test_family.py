"""FAULTS row 32: a prompt list that cannot carry a family is refused, never pruned from silently."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipcast.errors import RecipeError
from slipcast_compiler.recipe.family import expand, outside
from slipcast_compiler.recipe.recipe import EvaluateTable, FamilyTable


def _table(**values: object) -> FamilyTable:
    return FamilyTable.model_validate({"slots": {}, **values})


def test_templates_expand_to_every_combination(tmp_path: Path) -> None:
    slots = {"size": ("small", ""), "color": ("red", "blue")}
    family = expand(_table(templates=("a {size} {color} disc", "{color}!"), slots=slots), "f", tmp_path)
    assert set(family.calibration) | set(family.held_out) == {
        "a small red disc", "a small blue disc", "a red disc", "a blue disc", "red!", "blue!",
    }  # fmt: skip
    assert not set(family.calibration) & set(family.held_out)


@given(st.sets(st.text(st.characters(categories=["L"]), min_size=1), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_split_is_a_partition_and_adding_a_prompt_moves_no_other_by_much(prompts: set[str], share: float) -> None:
    listed = sorted(prompts)
    family = expand(_table(prompts=tuple(listed), held_out=share), "f", Path())
    together = family.calibration + family.held_out
    assert len(set(together)) == len(together)
    assert family.calibration
    assert family.held_out
    assert expand(_table(prompts=tuple(reversed(listed)), held_out=share), "f", Path()).held_out == family.held_out


def test_hash_depends_on_prompts_split_and_closedness(tmp_path: Path) -> None:
    prompts = tuple(f"prompt {i}" for i in range(20))
    base = expand(_table(prompts=prompts), "f", tmp_path).hash
    assert base == expand(_table(prompts=prompts), "other name", tmp_path).hash
    changes = ({"prompts": (*prompts, "x")}, {"held_out": 0.5}, {"seed": 1}, {"closed": True})
    others = [expand(_table(**{"prompts": prompts, **change}), "f", tmp_path).hash for change in changes]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no prompts in it"),
        (b"# only a comment\n\n", "no prompts in it"),
        (b"one prompt\n", "too small"),
        (b"twice\ntwice\n", "too small"),
        (b"fine\nna\xefve\n", "prompts.txt:2: not UTF-8"),
    ],
)
def test_row_32_unusable_prompt_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=says) as caught:
        expand(_table(prompts_file="prompts.txt"), "f", tmp_path)
    assert caught.value.exit_code == 2


def test_row_32_missing_file_and_directory(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("absent.txt", "folder"):
        with pytest.raises(RecipeError, match=name):
            expand(_table(prompts_file=name), "f", tmp_path)


def test_row_32_duplicates_and_small_families_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa  cat\na cat\n\na dog\na café\na cafe\u0301\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        family = expand(_table(prompts_file="prompts.txt"), "f", tmp_path)
    assert sorted(family.calibration + family.held_out) == ["a café", "a cat", "a dog"]
    assert "2 duplicate" in caplog.text
    assert "only 1 of 3 prompts are held out" in caplog.text


def test_prompts_out_of_the_family(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = expand(_table(prompts=("a cat", "a dog")), "f", tmp_path)
    (tmp_path / "others.txt").write_text("# not pets\na  car\na car\na boat\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert outside(EvaluateTable(out_of_family_file="others.txt"), family, tmp_path) == ("a car", "a boat")
    assert "1 duplicate or empty prompts dropped from evaluate.out_of_family" in caplog.text
    assert outside(EvaluateTable(), family, tmp_path) == ()
    for table, says in (
        ({"out_of_family": ("a car", "a  dog")}, "a prompt is of the family"),
        ({"out_of_family_file": "absent.txt"}, r"evaluate\.out_of_family_file does not exist"),
    ):
        with pytest.raises(RecipeError, match=says):
            outside(EvaluateTable.model_validate(table), family, tmp_path)
