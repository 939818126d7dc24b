"""Whatever a recipe says, nothing is judged on noise that something was chosen or trained by."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipcast.errors import RecipeError
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge import originals
from slipcast_compiler.model.original import Drawing
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.reading import read_recipe
from slipcast_compiler.recipe.recipe import EvaluateTable, ProfileTable
from slipcast_compiler.recipe.seeds import RANGES, Seeds
from slipcast_compiler.search.described import drawings_of

SHAPES = Path("recipes/shapes-circles.toml")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(read_recipe(SHAPES), SHAPES.parent)


@pytest.mark.parametrize("seeds", RANGES, ids=lambda seeds: seeds.purpose)
@given(data=st.data())
def test_seeds_are_of_their_range_or_refused(seeds: Seeds, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 64))
    offset = data.draw(st.integers(0, 2**33) | st.integers(seeds.size - 70, seeds.size + 2))
    if offset + count > seeds.size:
        with pytest.raises(RecipeError, match=f"not as many seeds for {seeds.purpose}"):
            seeds.take(count, offset)
    else:
        taken = seeds.take(count, offset)
        assert len(set(taken)) == count
        assert all(seeds.first <= seed < seeds.first + seeds.size for seed in taken)


def test_ranges_do_not_meet_in_the_32_bits_that_torch_takes() -> None:
    assert all(each.first >= 0 and each.first + each.size <= 2**32 for each in RANGES)
    for one, other in combinations(RANGES, 2):
        assert one.first + one.size <= other.first or other.first + other.size <= one.first


def _judged(plan: Plan) -> tuple[set[int], set[int]]:
    """Seeds of the gate's pictures, noise floors included, and of those out of the family: all that are drawn."""
    drawn: list[Drawing] = []

    def keep(drawing: Drawing, *_: Any) -> tuple[Any, None]:
        drawn.append(drawing)
        return np.zeros((len(drawing.seeds), 1, 1, 3), np.float32), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(originals, "_drawn", keep)
        found = originals.run_originals(plan.evaluation, Cache(Path()), lambda done, total: None)
    every, last = {seed for drawing in drawn for seed in drawing.seeds}, set(found.seeds[len(plan.held_out) :])
    return every - last, last


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    table=st.builds(
        EvaluateTable,
        seed=st.integers(0, 2**27 - 1) | st.sampled_from([0, 1000, 2**27 - 1]),
        images=st.integers(1, 3000),
    ),
    profile=st.builds(ProfileTable, seed=st.integers(0, 999), prompts=st.integers(1, 300), seeds=st.integers(1, 30)),
    strangers=st.integers(0, 40),
    prompted=st.booleans(),
    count=st.integers(1, 3000),
)
def test_no_two_purposes_have_a_seed_in_common(
    plan: Plan, table: EvaluateTable, profile: ProfileTable, strangers: int, prompted: bool, count: int
) -> None:
    recipe = plan.recipe.model_copy(update={"evaluate": table, "profile": profile})
    asked = dataclasses.replace(
        plan, recipe=recipe, family=plan.family if prompted else None, out_of_family=("a cat",) * strangers
    )
    graphs = Graphs("x", asked.original, asked.family, asked.sampling, asked.reference, {})
    gate, out_of_family = _judged(asked)
    search = drawings_of(asked)
    purposes = {
        "the gate": gate,
        "out of the family": out_of_family,
        "calibration": {*asked.drawing(count).seeds, *(seed for _, seed in graphs.calibration(count))},
        "the profile": set(asked.task.calibration.seeds),
        "the search": {seed for drawing in search for seed in drawing.seeds},
    }
    assert len(out_of_family) == strangers and len(gate) == 2 * len(asked.held_out)
    assert not set(search[0].seeds) & set(search[1].seeds)
    for one, other in combinations(purposes, 2):
        assert not {s % 2**32 for s in purposes[one]} & {s % 2**32 for s in purposes[other]}, (one, other)
