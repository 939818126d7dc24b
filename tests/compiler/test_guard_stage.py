"""Thresholds of the guard, and the recipes that cannot have one."""

from __future__ import annotations

import numpy as np
import pytest

from slipcast.errors import RecipeError
from slipcast.run.guard import NEIGHBOURS, nearness
from slipcast_compiler.export.guard import choose_threshold, left_out
from slipcast_compiler.recipe.reading import parse_recipe

RECIPE = """
name = "x"
guard = {}
model.path = "m"
[[targets]]
engine = "onnxruntime"
"""


@pytest.mark.parametrize(
    ("count", "false_alarms", "place"), [(19, 0.05, 19), (99, 0.05, 95), (9, 0.1, 9), (64, 0.05, 62)]
)
def test_the_threshold_is_one_of_the_distances(count: int, false_alarms: float, place: int) -> None:
    distances = [float(i) for i in range(1, count + 1)]
    assert choose_threshold(distances[::-1], false_alarms) == place


def test_so_many_false_alarms_as_were_asked_for() -> None:
    """On new prompts of the same kind, over many families: the promise is one of the mean."""
    rng, alarms = np.random.default_rng(0), []
    for _ in range(60):
        points = rng.normal(size=(79 + 40, 6)).astype(np.float32)
        threshold = choose_threshold(left_out(points[:79]), 0.1)
        alarms += [nearness(points[:79], one) > threshold for one in points[79:]]
    assert 0.07 < np.mean(alarms) < 0.13


def test_a_prompt_is_not_its_own_neighbour() -> None:
    points = np.eye(NEIGHBOURS + 1, dtype=np.float32)
    assert left_out(points) == pytest.approx([2**0.5] * (NEIGHBOURS + 1))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('family = {prompts = ["a", "b"], closed = true}', "a closed one refuses all other prompts by name"),
        ("", "for a model with prompts"),
    ],
)
def test_families_that_need_no_guard(more: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_recipe(f"{more}\n{RECIPE}", "x.toml")
