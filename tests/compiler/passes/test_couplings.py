"""What is said of coupled projections: the rank of their product, and that as many columns are enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compiler.passes.tiny import Bench, tiny_plan
from slipcast_compiler.model.layers import attention_layers
from slipcast_compiler.passes.couplings import couplings, joint_rank, root

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_rank_of_a_product(rank: int) -> None:
    a, b = (RNG.standard_normal((8, size)) for size in (40, 30))
    a = RNG.standard_normal((8, rank)) @ RNG.standard_normal((rank, 8)) @ a
    assert joint_rank(a, b, 1 - 1e-12) == rank == np.linalg.matrix_rank(a.T @ b)


def test_so_many_columns_are_exactly_enough() -> None:
    """The pair rewritten to a narrower head gives the same scores."""
    a = RNG.standard_normal((8, 3)) @ RNG.standard_normal((3, 40))
    b = RNG.standard_normal((8, 30))
    r = joint_rank(a, b, 1 - 1e-12)
    u, s, vt = np.linalg.svd(a.T @ b, full_matrices=False)
    narrow_a, narrow_b = (u[:, :r] * s[:r]).T, vt[:r]
    assert len(narrow_a) == 3
    np.testing.assert_allclose(narrow_a.T @ narrow_b, a.T @ b, atol=1e-9)


def test_a_pair_that_does_nothing() -> None:
    assert joint_rank(np.zeros((8, 4)), np.ones((8, 4)), 0.9) == 0


def test_the_root_is_one() -> None:
    z = RNG.standard_normal((50, 6)).astype(np.float32)
    moment = z.T @ z
    found = root(moment)
    np.testing.assert_allclose(found @ found.T, moment, rtol=1e-4, atol=1e-4)


def test_every_layer_is_in_the_report(tmp_path: Path) -> None:
    bench = Bench(tiny_plan(tmp_path), tmp_path)
    whole = couplings(bench.denoiser, bench.context, 1 - 1e-9)
    assert set(whole) == {layer.name for layer in attention_layers(bench.denoiser.module)}
    less = couplings(bench.denoiser, bench.context, 0.9)
    for name, found in whole.items():
        assert 0 < less[name]["query_key"] <= found["query_key"] <= found["head_dim"]
        assert 0 < less[name]["value_output"] <= found["value_output"] <= found["head_dim"]
