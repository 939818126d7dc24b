"""What a dry run says that a compile needs, against what it was seen to take."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipcast_compiler.estimate import summarise
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import read_recipe

RECIPE = Path(__file__).parents[2] / "recipes/shapes-circles.toml"


@pytest.fixture(scope="module")
def said() -> dict[str, int]:
    summary = summarise(make_plan(read_recipe(RECIPE), RECIPE.parent))
    return {**summary["disk_bytes"], "memory": summary["memory_bytes"]}


@pytest.mark.parametrize("of", ["bundle", "cache", "memory"])
def test_an_estimate_is_near_what_is_measured(of: str, said: dict[str, int], took: dict[str, int]) -> None:
    assert said[of] == pytest.approx(took[of], rel=0.25)
