"""The study's recipe: all problems at once, with lines; equal budgets; no judged prompt is ever calibrated on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import ROOT
from slipcast.errors import RecipeError

sys.path.insert(0, str(ROOT / "recipes" / "study"))
from heads.cases import OUT, Study, held_out, make_study, paraphrases
from heads.recipe import GENERIC, parse_study, read_study

STUDY = ROOT / "recipes" / "study"
SHIPPED = STUDY / "heads.toml"
SMALL = f"""
name = "small"
scorer = "{ROOT}/recipes/models/shapes-scorer"
images = 2
seeds = [10, 20]
ratios = [0.3, 0.5]
out_of_family = ["a red star above a blue ring", "a red star below a blue ring"]
model.path = "{ROOT}/recipes/models/shapes"
sampling = {{steps = 1, width = 16, height = 16}}
profile = {{prompts = 4, states = 1, leave_one_out = "projected"}}

[families.circles]
templates = ["a {{color}} circle"]
slots.color = ["red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan", "black", "gray"]

[families.stars]
templates = ["a {{color}} star"]
slots.color = ["red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan", "black", "gray"]

[generic]
templates = ["a {{color}} {{shape}}"]
slots.color = ["red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan", "black", "gray"]
slots.shape = ["circle", "star"]

[paraphrases]
circles = ["a disc in red", "a disc in blue"]
stars = ["a red star on white", "a blue star on white"]

[[masks]]
criterion = "leave_one_out"
calibration = ["family", "generic"]
out_of_family = true
paraphrases = true

[[masks]]
criterion = "magnitude"

[[masks]]
criterion = "random"
"""


@pytest.fixture(scope="module")
def small() -> Study:
    return make_study(parse_study(SMALL, "small.toml"), Path("."))


def test_all_problems_at_once_with_their_lines() -> None:
    text = SMALL.replace("images = 2", "imagse = 2").replace("[0.3, 0.5]", "[0.3, 1.5]")
    text = text.replace('criterion = "magnitude"', 'criterion = "magnitude"\ncalibration = ["generic"]')
    text = text.replace('templates = ["a {color} star"]', 'templates = ["a {colour} star"]')
    with pytest.raises(RecipeError) as caught:
        parse_study(text, "bad.toml")
    message = str(caught.value)
    assert message.startswith("4 problems in the recipe:")
    lines = text.splitlines()
    for key, line in (
        ("imagse: unknown key 'imagse', did you mean 'images'?", "imagse = 2"),
        ("ratios[1]: ", "ratios = [0.3, 1.5]"),
        ("families.stars: templates use slots that are not defined: colour", "[families.stars]"),
        ("masks[1]: magnitude reads weights alone: no calibration", "[[masks]]"),
    ):
        where = next(part for part in message.splitlines() if key in part)
        assert lines[int(where.split(":")[1]) - 1].startswith(line)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[families.stars]", "[families.generic]", "the name is that of the other calibration"),
        ('stars = ["a red star on white", "a blue star on white"]', "", "which not every family has"),
        ('criterion = "random"', 'criterion = "magnitude"', "two masks with the same criterion"),
        ("[10, 20]", "[20, 10]", "seeds have to rise"),
        ('calibration = ["family", "generic"]', "", "leave_one_out needs a calibration"),
    ],
)  # fmt: skip
def test_contradictions(old: str, new: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_study(SMALL.replace(old, new, 1), "bad.toml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("images = 2", "images = 3", "families.circles is too small"),
        ("[10, 20]", "[10, 11]", "seeds are too close"),
        ('"a red star above a blue ring"', '"a red star"', "out_of_family: a prompt is of the family stars"),
        ("prompts = 4", "prompts = 40", "too few prompts are left to calibrate on"),
    ],
)
def test_what_only_the_prompts_tell(old: str, new: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_study(parse_study(SMALL.replace(old, new, 1), "bad.toml"), Path("."))


def test_the_budget_is_equal_and_every_mask_is_there(small: Study) -> None:
    ways = {(case.criterion, case.calibration) for case in small.cases}
    measured = {("leave_one_out", name) for name in ("circles", "stars", GENERIC)}
    assert ways == measured | {("magnitude", None), ("random", None)}
    assert len(set(small.cases)) == len(small.cases) == len(ways) * 2 * 2
    for criterion, calibration in ways:
        of = [c for c in small.cases if (c.criterion, c.calibration) == (criterion, calibration)]
        assert sorted((c.ratio, c.seed) for c in of) == [(0.3, 10), (0.3, 20), (0.5, 10), (0.5, 20)]
    options = [case.options(small.recipe) for case in small.cases]
    assert {o.floor for o in options} == {1}
    assert {o.seed for o in options if o.criterion == "random"} == {10, 20}


def test_families_are_judged_on_their_own_prompts_and_shared_masks_on_all(small: Study) -> None:
    sets = {(case.criterion, case.calibration): set(case.sets) for case in small.cases}
    assert sets["leave_one_out", "stars"] == {held_out("stars"), OUT, paraphrases("stars")}
    every = {held_out("stars"), held_out("circles")}
    assert sets["leave_one_out", GENERIC] == every | {OUT, paraphrases("stars"), paraphrases("circles")}
    assert sets["magnitude", None] == sets["random", None] == every


@pytest.mark.parametrize("recipe", ["small", "shipped"])
def test_no_judged_prompt_is_calibrated_on(small: Study, recipe: str) -> None:
    study = small if recipe == "small" else make_study(read_study(SHIPPED), SHIPPED.parent)
    judged = {prompt for prompts in study.sets.values() for prompt in prompts}
    wanted = study.recipe.profile.prompts
    for plan in study.plans.values():
        assert plan.family
        assert len(plan.family.calibration) == wanted
        assert not judged & set(plan.family.calibration)
    # The generic family does contain the held-out prompts of the others: it is the study that keeps them out.
    if recipe == "small":
        assert {p for p in judged if p.endswith((" circle", " star"))} < {
            f"a {color} {shape}" for color in small.recipe.generic.slots["color"] for shape in ("circle", "star")
        }


def test_every_seed_is_a_calibration_of_its_own(small: Study) -> None:
    for name in ("circles", "stars", GENERIC):
        first, second = (small.plans[name, seed].task.calibration for seed in (10, 20))
        assert set(first.prompts) != set(second.prompts)
        assert not set(first.seeds) & set(second.seeds)
        assert not {*first.seeds, *second.seeds} & {seed + i for seed in (10, 20) for i in range(10)}


def test_the_shipped_study_asks_what_the_issue_does() -> None:
    recipe = read_study(SHIPPED)
    assert len(recipe.families) >= 3
    assert len(recipe.seeds) >= 3
    assert (min(recipe.ratios), max(recipe.ratios)) == (0.1, 0.6)
    both = {mask.criterion for mask in recipe.masks if set(mask.calibration) == {"family", "generic"}}
    assert "leave_one_out" in both
    assert {"magnitude", "random"} <= {mask.criterion for mask in recipe.masks}
