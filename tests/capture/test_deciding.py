"""A module runs once for what decides what it does: shapes, values that it reads, and its own state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slipcast_compiler.capture.shapes import ShapeRunner


class Counted(nn.Module):
    """Counts how often its code runs."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.weight, self.double, self._read, self.runs = nn.Parameter(torch.ones(2, 2)), False, read, []

    def forward(self, x: torch.Tensor, time: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        self.runs.append(time)
        return self._read(x @ self.weight, time, lengths)


def never(x: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return x * time


def lengths_listed(x: torch.Tensor, time: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return x[: max(lengths.tolist())] * time


def lengths_in_a_copy(x: torch.Tensor, _: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    places = torch.zeros(4, dtype=torch.int64)
    places[1:3].copy_(lengths[:2] + 1)
    return x[: int(places.max())]


def lengths_masked(x: torch.Tensor, _: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return x[:2][lengths > 1]


def lengths_of_a_constant(x: torch.Tensor, _: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return x[: int(torch.tensor([1, 2]).max())] * lengths.sum()


@pytest.mark.parametrize(
    ("read", "by_time", "by_lengths"),
    [
        (never, 1, 1),
        (lengths_listed, 1, 2),
        (lengths_in_a_copy, 1, 2),
        (lengths_masked, 1, 2),
        (lengths_of_a_constant, 1, 1),
    ],
)
def test_it_runs_again_for_other_values_that_it_reads(read: Any, by_time: int, by_lengths: int) -> None:
    for times, lengths, runs in (
        ((1.0, 2.0, 1.0), ([1, 2],) * 3, by_time),
        ((1.0,) * 3, ([1, 2], [2, 3], [1, 2]), by_lengths),
    ):
        module, runner = Counted(read).to("meta"), ShapeRunner()
        module.runs = counted = list[Any]()
        found = []
        for time, counts in zip(times, lengths, strict=True):
            given = (torch.ones(6, 2), torch.tensor(time), torch.tensor(counts))
            out = runner.run(module, "module", given, {}, is_known=lambda tensor: not tensor.ndim).out
            found.append(out.shape)
            with torch.device("cpu"):
                assert out.shape == Counted(read)(*given).shape
        assert len(counted) == runs
        assert found[0] == found[2]


def test_it_runs_again_when_it_is_another_one() -> None:
    module, runner = Counted(never).to("meta"), ShapeRunner()
    given = (torch.ones(6, 2), torch.tensor(1.0), torch.tensor([1]))
    assert runner.run(module, "module", given, {}).out.shape == (6, 2)
    module._read = lambda x, _, __: x[:1]
    assert runner.run(module, "module", given, {}).out.shape == (1, 2)
