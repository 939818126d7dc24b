"""What tracing needs besides: symbols that stay symbols, and complex numbers as pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from slipcast_compiler.export.pairs import as_pairs
from slipcast_compiler.export.symbols import symbols_kept


class Cutting(nn.Module):  # type: ignore[misc]
    """Cuts a table to the number of rows, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(64.0), torch.arange(1.0, 5.0))
        self.table = torch.polar(torch.ones_like(angles), angles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = int(x.shape[0])
        first, second = self.table.split([2, 2], dim=1)
        turns = torch.cat([second, first], dim=1)[:rows]
        turns = turns.unsqueeze(1).expand(rows, 3, 4)[torch.arange(rows)]
        pairs = torch.view_as_complex(x.reshape(rows, 3, 4, 2))
        return torch.view_as_real(pairs * turns).flatten(2)


def _traced(module: nn.Module) -> Any:
    with symbols_kept(module):
        return torch.export.export(module, (torch.ones(5, 3, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))


def test_int_of_a_size_stays_a_symbol_and_is_int_again_after_it() -> None:
    traced = _traced(Cutting())
    x = torch.rand(9, 3, 8)
    torch.testing.assert_close(traced.module()(x), Cutting()(x))
    assert "int" not in globals()
    with pytest.raises(Exception, match="specialized"):
        torch.export.export(Cutting(), (torch.ones(5, 3, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))


class Counting(nn.Module):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.as_tensor(x.shape[0], device=x.device) + torch.as_tensor(x.shape[0], dtype=torch.float32)


def test_a_size_in_a_tensor_stays_a_symbol() -> None:
    traced, x = _traced(Counting()), torch.rand(9, 3, 8)
    torch.testing.assert_close(traced.module()(x), x * 9 + 9)


def test_int_is_what_it_was_for_all_else() -> None:
    module = Cutting()
    with symbols_kept(module):
        kind = globals()["int"]
        assert (kind("12"), kind(2.7), kind("11", base=2)) == (12, 2, 3)
        assert isinstance(3, kind) and not isinstance("3", kind) and isinstance(3, kind | float)


def test_complex_numbers_are_moved_as_pairs() -> None:
    traced = _traced(Cutting())
    changed = as_pairs(traced)
    x = torch.rand(7, 3, 8)
    torch.testing.assert_close(changed.module()(x), Cutting()(x))
    moved = {torch.ops.aten.unsqueeze.default, torch.ops.aten.expand.default, torch.ops.aten.index.Tensor}
    for node in changed.graph.nodes:
        value = node.meta.get("val")
        assert node.target not in moved or not value.is_complex(), node
        assert node.target is not torch.ops.aten.split_with_sizes.default


def test_a_graph_of_reals_is_left_as_it_is() -> None:
    traced = torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),))
    assert as_pairs(traced) is traced
