"""How PIL resizes pictures, as arithmetic on tensors: in fixed point, row by row and column by column."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

HALF = 11  # bits of half a factor


def resize(levels: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Of [..., height, width], whole numbers up to 255, as PIL does it: row by row, and column by column."""
    dims = -1, -2
    sizes = dict(zip(dims, reversed(size), strict=True))
    if size != levels.shape[-2:] and _columns_first(tuple(levels.shape[-2:]), size, resample):
        dims = -2, -1
    for dim in dims:
        levels = _resize_along(levels, dim, sizes[dim], resample) if levels.shape[dim] != sizes[dim] else levels
    return levels


def reduce(levels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The mean of each block of so many rows and columns, as PIL's Image.reduce rounds it: its factor, of 24 bits, is a
    little less than 1 / n, so that a half of n that is no power of two is rounded down."""
    if rows == columns == 1:
        return levels
    *others, height, width = levels.shape
    count = rows * columns
    sums = levels.reshape(*others, height // rows, rows, width // columns, columns).sum((-3, -1))
    less = 0.0 if count & (count - 1) == 0 else 0.5
    return ((sums + (count // 2 - less)) / count).floor()


@functools.cache
def _columns_first(before: tuple[int, int], after: tuple[int, int], resample: int) -> bool:
    """In which order PIL resizes, as it rounds in between: asked of it, since versions differ."""
    levels = np.random.default_rng(0).integers(0, 256, before, np.uint8)
    picture = torch.from_numpy(levels.astype(np.float32))
    wanted = Image.fromarray(levels).resize(after[::-1], Image.Resampling(resample))
    apart = []
    for dims in ((-1, -2), (-2, -1)):
        made = picture
        for dim in dims:
            made = _resize_along(made, dim, after[dim], resample) if made.shape[dim] != after[dim] else made
        apart.append(float((made - torch.from_numpy(np.array(wanted, np.float32))).abs().sum()))
    return apart[1] < apart[0]


def _resize_along(levels: torch.Tensor, dim: int, to: int, resample: int) -> torch.Tensor:
    """With factors of 22 bits, which are summed in two halves: float32 has whole numbers of 24."""
    factors = (_filter(levels.shape[dim], to, resample) * 2.0 ** (2 * HALF)).round()
    high = (factors / 2**HALF).floor()
    low = factors - high * 2**HALF

    def summed(by: torch.Tensor) -> torch.Tensor:
        return levels @ by.float().T if dim == -1 else by.float() @ levels

    whole = summed(high) + (summed(low) / 2**HALF).floor()
    return ((whole + 2 ** (HALF - 1)) / 2**HALF).floor().clamp(0, 255)


@functools.cache
def _filter(size: int, to: int, resample: int) -> torch.Tensor:
    """float64 [to, size]: what PIL's filter takes of each row, as it resizes the rows of the unit matrix."""
    rows = Image.fromarray(np.eye(size, dtype=np.float32)).resize((size, to), Image.Resampling(resample))
    return torch.from_numpy(np.array(rows, np.float64))


def as_pictures(x: torch.Tensor) -> list[Image.Image]:
    """Of float32 [n, channels, height, width] in [0, 1]."""
    levels = (x.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each if each.shape[-1] == 3 else each[..., 0]) for each in levels]
