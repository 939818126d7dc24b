"""Writes into what another part of a program holds become new tensors, and views of it are made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from test_parts_of_programs import Writing
from test_refusals import Denoiser

from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.cut import cut
from slipcast_compiler.capture.program import Op
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.verify import verify


def _fill(x: torch.Tensor) -> None:
    x[1:] = 0.25


def _mask(x: torch.Tensor) -> None:
    x.masked_fill_(x > 0, 0.5)


def _into_a_constant(x: torch.Tensor) -> None:
    mask = torch.zeros(3, 2)
    mask[1:, :1] = x[:2, 1:]
    mask[:, 1] = 2.0
    x.mul_(mask)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "all": lambda x: x.mul_(0.5),
    "a row": lambda x: x[1].add_(1.0),
    "some rows": _fill,
    "through a view of a view": lambda x: x.t()[:, 1:].unsqueeze(0).copy_(x.t()[:, :2].sin()),
    "in another shape": lambda x: x.view(6)[2:4].mul_(3.0),
    "where a mask is": _mask,
    "into a constant": _into_a_constant,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_a_new_tensor(name: str) -> None:
    class Own(Writing):
        def write(self, first: torch.Tensor) -> None:
            row = first[1]  # a view that is read after the write
            WRITES[name](first)
            first.add_(row.mean())

    pipe = Own(Denoiser(), DDIMScheduler())
    program = capture(pipe, make_call(pipe, {}))
    assert not any(isinstance(each, Op) and each.function._schema.is_mutable for each in program.events)
    assert {part.name for part in cut(program).parts} >= {"start", "denoiser", "update"}
    verdict = verify(program, pipe, make_call(pipe, {}, seed=7), make_call(pipe, {}, seed=7))
    assert verdict.error == 0
    assert all(mark.begin < mark.end for mark in program.marks)
