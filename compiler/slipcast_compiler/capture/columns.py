"""What the numbers that differ from step to step are: laws of the timestep, of the noise level, or of the guidance.

A part that is used at every step has constants of its own there. Where each is a * q + b, of one quantity q that a
sampler knows for any schedule, a run can have other steps than those that were captured. Others may be the same at all
steps, and differ between the calls that share the part, as sizes that a model is told do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from slipcast.bundle.driving import QUANTITIES, Column, quantities
from slipcast_compiler.capture.cut import Cut, Part
from slipcast_compiler.capture.driving import Driven

DISTINCT = 3  # values of a quantity: two make a law, and the third checks it
EXACT = 1e-5  # of the largest number: constants are float32
At = Mapping[str, float]  # by name, the quantities of an evaluation
Columns = tuple[Column | None, ...]  # of a part's table; None: as in the row


def evaluations(driven: Driven, guidance: float) -> list[At]:
    """The quantities at each of a program's evaluations."""
    process = driven.sampling.noise
    return [quantities(process, each.timestep, each.sigma, guidance) for each in driven.evaluations]


def find_columns(name: str, cuts: Sequence[Cut], at: Sequence[Sequence[At]]) -> Columns | None:
    """What the columns of a part's table are, in order: a law, or None for one that is the same in all uses; None in
    place of all where one is neither. `at`: of each program that was cut together, its evaluations; a part that is used
    once is used at the first."""
    part = next(part for cut in cuts for part in cut.parts if part.name == name)
    uses = [
        (use.row, places[step])
        for cut, places in zip(cuts, at, strict=True)
        for step, use in enumerate(use for use in cut.uses if use.part == name)
    ]
    used = [row for row, _ in uses]
    found = [None if is_fixed(rows, used) else _law(part, place, uses) for place, (_, rows) in enumerate(part.table)]
    lawless = [rows for law, (_, rows) in zip(found, part.table, strict=True) if law is None]
    return tuple(found) if all(is_fixed(rows, used) for rows in lawless) else None


def is_fixed(rows: torch.Tensor, used: Iterable[int | None]) -> bool:
    """Whether a column of a table is the same in all rows that are used."""
    first, *others = sorted({row or 0 for row in used})
    return all(torch.equal(rows[first], rows[other]) for other in others)


def _law(part: Part, place: int, uses: Sequence[tuple[int | None, At]]) -> Column | None:
    rows: torch.Tensor = part.table[place][1]
    if rows.is_complex() or rows.dtype == torch.bool:
        return None
    numbers = rows.double().reshape(len(rows), -1)
    if not numbers.isfinite().all() or (numbers != numbers[:, :1]).any():
        return None
    wanted = np.array([float(numbers[row or 0, 0]) for row, _ in uses])
    for name in QUANTITIES:
        given = np.array([each[name] for _, each in uses])
        if len(set(given)) < 2:
            continue
        scale, offset = np.polyfit(given, wanted, 1)
        column = Column(of=name, scale=_round(scale), offset=_round(offset, float(np.abs(wanted).max())))
        if len(set(given)) < DISTINCT and column.offset and abs(column.scale) != 1:
            continue  # any law fits two values, but q, a q and b - q are what pipelines do
        if len(set(given)) < DISTINCT and name != "guidance" and (column.scale, column.offset) != (1, 0):
            continue
        told = column.scale * given + column.offset
        if rows.dtype.is_floating_point:
            exact = np.abs(told - wanted).max() <= EXACT * np.abs(wanted).max()
        else:
            exact = bool((np.round(told) == wanted).all())
        if exact:
            return column
    return None


def _round(number: float, beside: float = 1.0) -> float:
    """Without what the fit left of noise: a number of few digits, where it is as near to one."""
    near = float(f"{number:.6g}")
    if abs(number) <= 1e-7 * beside:
        return 0.0
    return near if abs(near - number) <= 1e-7 * abs(number) else number
