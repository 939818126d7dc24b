"""Selection of units, and the least-squares correction, against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slipcast.errors import NumericalError, RecipeError
from slipcast_compiler.passes import units
from slipcast_compiler.passes.units import columns, corrected, damped, removal_costs, select

Array = np.ndarray[Any, Any]
SCORES = {"a": np.array([1, 5, 2, 6], np.float32), "b": np.array([3, 4], np.float32)}


def _case(size: int, count: int, outputs: int = 7) -> tuple[Array, Array, Array]:
    """A weight [outputs, inputs], correlated inputs [samples, inputs], and their second moment."""
    rng = np.random.default_rng(size * 100 + count)
    inputs = size * count
    z = rng.standard_normal((400, inputs)) @ rng.standard_normal((inputs, inputs))
    return rng.standard_normal((outputs, inputs)).astype(np.float32), z, (z.T @ z / len(z)).astype(np.float32)


def test_the_lowest_scores_of_all_layers_go() -> None:
    assert select(SCORES, 0.5, 1, (), "p") == {"a": (1, 3), "b": (1,)}
    assert select(SCORES, 0.0, 1, (), "p") == {"a": (0, 1, 2, 3), "b": (0, 1)}


def test_floors_and_protected_layers_keep_theirs() -> None:
    assert select(SCORES, 0.5, 1, ("b*",), "p") == {"a": (3,), "b": (0, 1)}
    assert select({"a": SCORES["a"], "b": SCORES["b"] - 3}, 1 / 3, 2, (), "p") == {"a": (1, 3), "b": (0, 1)}


@pytest.mark.parametrize(("floor", "most"), [(1, "0.67"), (2, "0.33"), (4, "0.00")])
def test_row_33_a_ratio_that_would_leave_a_layer_no_heads(floor: int, most: str) -> None:
    with pytest.raises(RecipeError, match=r"prune_x\.ratio cannot be reached") as caught:
        select(SCORES, 0.9, floor, (), "prune_x")
    assert f"at most {most} " in str(caught.value)


def test_a_pattern_that_protects_nothing() -> None:
    with pytest.raises(RecipeError, match=r"prune_x\.protect") as caught:
        select(SCORES, 0.5, 1, ("a", "c*"), "prune_x")
    assert "got:      c*" in str(caught.value)


def test_row_33_a_score_that_is_not_a_number_names_its_layer() -> None:
    with pytest.raises(NumericalError, match="b: "):
        select({"a": SCORES["a"], "b": np.array([1, np.nan], np.float32)}, 0.5, 1, (), "p")


@pytest.mark.parametrize("kept", [(0,), (1, 3), (0, 1, 2, 3)])
def test_the_correction_is_the_least_squares_solution(kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "DAMPING", 1e-10)
    weight, z, moment = _case(3, 4)
    chosen = columns(kept, 3)
    found = corrected(weight, moment, chosen, "layer")
    wanted, *_ = np.linalg.lstsq(z[:, chosen], z @ weight.T, rcond=None)
    np.testing.assert_allclose(found, wanted.T, rtol=1e-3, atol=1e-3)


def test_no_other_weights_are_better_than_the_corrected_ones() -> None:
    weight, z, moment = _case(2, 5)
    chosen = columns((0, 2, 4), 2)
    best = corrected(weight, moment, chosen, "layer")

    def error(candidate: Array) -> float:
        return float(np.square(z[:, chosen] @ candidate.T - z @ weight.T).mean())

    rng = np.random.default_rng(0)
    for scale in (1e-2, 1e-1):
        assert error(best) < error(best + scale * rng.standard_normal(best.shape))
    assert error(best) < 0.9 * error(weight[:, chosen])


@pytest.mark.parametrize(("size", "count"), [(1, 6), (3, 4)])
def test_removal_costs_are_those_of_brute_force(size: int, count: int) -> None:
    """Whatever is cheapest to remove is found by solving for every candidate anew; its cost is all that is lost."""
    weight, _, moment = _case(size, count)
    h = damped(moment)
    target = weight @ h @ weight.T

    def lost(kept: list[int]) -> float:
        chosen = columns(kept, size)
        cross = weight @ h[:, chosen]
        explained = cross @ np.linalg.pinv(h[np.ix_(chosen, chosen)]) @ cross.T
        return float(np.trace(target - explained) / np.trace(target))

    left, wanted = list(range(count)), np.zeros(count)
    while left:
        price, unit = min((lost([other for other in left if other != unit]), unit) for unit in left)
        wanted[unit] = price
        left.remove(unit)
    np.testing.assert_allclose(removal_costs([(weight, moment, size)], "layer"), wanted, rtol=1e-4, atol=1e-6)


def test_a_moment_of_nothing_can_still_be_solved() -> None:
    weight, _, moment = _case(2, 3)
    assert np.isfinite(corrected(weight, np.zeros_like(moment), columns((1,), 2), "layer")).all()
    assert np.isfinite(removal_costs([(weight, np.zeros_like(moment), 2)], "layer")).all()
