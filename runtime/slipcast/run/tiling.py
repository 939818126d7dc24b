"""Evaluate a call on what is larger than its tile, tile by tile: besides one picture, memory depends on the tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.tiles import MULTIPLE, Tiling
from slipcast.errors import ArtifactError

Floats = npt.NDArray[np.float32]


def decode_tiled(
    decode: Callable[[Floats], Floats], latent: Floats, tiling: Tiling, measure: Callable[[Floats], None] | None = None
) -> Floats:
    """Decode float32, such as [1, c, h, w] to [1, k, h * factor, w * factor].

    Neighbouring tiles overlap and are blended with linear ramps, as diffusers' tiled decode does. All tiles have one
    shape, and are no larger than as many have to be. A latent that fits into one tile is decoded whole and exactly; in
    a tiled one the decoder's normalisation and attention see a tile instead of the whole, so colours differ slightly.
    `measure`: is given the latent as small as a tile, before those.
    """
    axes, sizes = tiling.axes, [latent.shape[axis.input] for axis in tiling.axes]
    if all(size <= tiling.tile for size in sizes):
        return decode(latent)
    tiles = [_even(tiling, size) for size in sizes]
    if measure:
        measure(_shrink(latent, tiling, tiles))
    total = weights = np.zeros(0, np.float32)
    places = [_starts(size, tile, _count(tiling, size)) for size, tile in zip(sizes, tiles, strict=True)]
    for starts in product(*places):
        cells: list[Any] = [np.s_[:]] * latent.ndim
        for axis, start, tile in zip(axes, starts, tiles, strict=True):
            cells[axis.input] = slice(start, start + tile)
        piece = decode(np.ascontiguousarray(latent[tuple(cells)]))
        _check_size(piece, tiling, tiles)
        window = np.ones([1] * piece.ndim, np.float32)
        area: list[Any] = [np.s_[:]] * piece.ndim
        for axis, start, tile, size in zip(axes, starts, tiles, sizes, strict=True):
            shape = [-1 if dim == axis.output else 1 for dim in range(piece.ndim)]
            window = window * _ramp(start, tile, size, tiling.overlap, axis.factor).reshape(shape)
            area[axis.output] = slice(start * axis.factor, start * axis.factor + piece.shape[axis.output])
        if not total.size:
            whole = {axis.output: size * axis.factor for axis, size in zip(axes, sizes, strict=True)}
            total = np.zeros([whole.get(dim, size) for dim, size in enumerate(piece.shape)], np.float32)
            weights = np.zeros([whole.get(dim, 1) for dim in range(piece.ndim)], np.float32)
        total[tuple(area)] += piece * window
        weights[tuple(area)] += window
    picture: Floats = np.divide(total, weights, out=total)
    return picture


def count_tiles(tiling: Tiling, shape: tuple[int, ...]) -> int:
    """How many tiles an input of this shape is."""
    return math.prod(_count(tiling, shape[axis.input]) for axis in tiling.axes)


def _count(tiling: Tiling, size: int) -> int:
    """How many along an axis."""
    return 1 if size <= tiling.tile else -(-(size - tiling.overlap) // (tiling.tile - tiling.overlap))


def _even(tiling: Tiling, size: int) -> int:
    """The side of tiles along an axis: where an engine takes any, the least that as many cover it with."""
    if size <= tiling.tile or tiling.smallest == tiling.tile:
        return min(size, tiling.tile)
    count = _count(tiling, size)
    least = -(-(size + (count - 1) * tiling.overlap) // count)
    return min(tiling.tile, max(tiling.smallest, -(-least // MULTIPLE) * MULTIPLE))


def _starts(size: int, tile: int, count: int) -> list[int]:
    """First cells of so many tiles along one axis, at equal distances; the last one ends where the latent does."""
    return [place * (size - tile) // max(1, count - 1) for place in range(count)]


def _shrink(latent: Floats, tiling: Tiling, tiles: Sequence[int]) -> Floats:
    """Some of its cells, at equal distances, so that their distribution is that of all."""
    for axis, tile in zip(tiling.axes, tiles, strict=True):
        latent = latent.take(np.arange(tile) * latent.shape[axis.input] // tile, axis.input)
    return np.ascontiguousarray(latent)


def _check_size(piece: Floats, tiling: Tiling, tiles: Sequence[int]) -> None:
    """ArtifactError where a tile is not as large as the manifest says."""
    for axis, tile in zip(tiling.axes, tiles, strict=True):
        found = piece.shape[axis.output] if axis.output < piece.ndim else 0
        if found != tile * axis.factor:
            raise ArtifactError(
                f"the decoder gives {found} cells for {tile}, where tiles say {tile * axis.factor}",
                hint="the engine is not of this manifest: compile the bundle again",
            )


def _ramp(start: int, tile: int, size: int, overlap: int, factor: int) -> Floats:
    """Weights of a tile's pixels along one axis: rising and falling over the overlap, but not at the picture's edge."""
    length = tile * factor
    rise = (np.arange(overlap * factor, dtype=np.float32) + 0.5) / max(1, overlap * factor)
    weights = np.ones(length, np.float32)
    if overlap and start > 0:
        weights[: len(rise)] = rise
    if overlap and start + tile < size:
        weights[-len(rise) :] = np.minimum(weights[-len(rise) :], rise[::-1])
    return weights
