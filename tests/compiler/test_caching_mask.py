"""The mask of feature caching: the least error of all masks, from errors that are known; and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from test_plan import planned

from slipcast.errors import RecipeError
from slipcast_compiler.recipe.reading import parse_recipe
from slipcast_compiler.schedule.caching import choose_mask


def _error(errors: np.ndarray, mask: tuple[bool, ...]) -> float:
    total, last = 0.0, 0
    for step, full in enumerate(mask):
        last = step if full else last
        total += 0.0 if full else errors[last, step]
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("full_steps", [1, 2, 3, 6, 7])
def test_no_other_mask_is_better(seed: int, full_steps: int) -> None:
    random, steps = np.random.default_rng(seed), 7
    errors = np.triu(random.random((steps, steps)) + 0.1, 1)
    errors[random.random((steps, steps)) < 0.2] = np.inf  # reuses that cannot be
    masks = [
        (True, *rest) for rest in itertools.product((True, False), repeat=steps - 1) if sum(rest) == full_steps - 1
    ]
    best = min(_error(errors, mask) for mask in masks)
    mask, error = choose_mask(errors, full_steps)
    if np.isinf(best):
        assert mask == ()
    else:
        assert sum(mask) == full_steps and mask[0]
        assert error == pytest.approx(best) and _error(errors, mask) == pytest.approx(best)


def test_full_steps_are_where_features_change() -> None:
    """Features that move at once between the second step and the third, and after that not at all."""
    at = np.array([0.0, 0.1, 5.0, 5.0, 5.0, 5.0])
    errors = np.triu(np.abs(at[:, None] - at[None, :]), 1)
    assert choose_mask(errors, 2)[0] == (True, False, True, False, False, False)


def test_where_no_mask_will_do_there_is_none() -> None:
    assert choose_mask(np.full((3, 3), np.inf), 2) == ((), np.inf)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("caching = {}\nsampling.sampler = 'heun'", "more often than once a step"),
        ("caching = {}\nsampling.sampler = 'pndm'", "more often than once a step"),
        ("caching.full_steps = 8\nsampling.steps = 8", "no step is left"),
        ("caching = {}\nsampling.steps = 1", "no step is left"),
    ],
)
def test_what_a_plan_refuses(recipe: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        planned(tmp_path, recipe)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            "passes.quantize = {}\ntargets = [{ engine = 'openvino', precision = 'int8' }]",
            "no shallow denoiser in INT8",
        ),
        ("caching.share = 1.5\ntargets = [{ engine = 'openvino' }]", "caching.share"),
    ],
)
def test_what_a_recipe_refuses(recipe: str, says: str) -> None:
    text = f'name = "x"\nmodel.path = "m"\nfamily.prompts = ["a", "b"]\ncaching.full_steps = 3\n{recipe}\n'
    with pytest.raises(RecipeError, match=says):
        parse_recipe(text, "x.toml")


def test_half_of_the_steps_are_full_where_nothing_is_said(tmp_path: Path) -> None:
    plan = planned(tmp_path, "caching = {}\nsampling.steps = 7")
    assert plan.recipe.caching
    assert plan.recipe.caching.full_of(plan.sampling.steps) == 4
