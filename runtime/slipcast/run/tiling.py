"""Evaluate a call on what is larger than its tile, tile by tile, so that memory depends on the tile alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.tiles import Tiling
from slipcast.errors import ArtifactError

Floats = npt.NDArray[np.float32]


def decode_tiled(
    decode: Callable[[Floats], Floats], latent: Floats, tiling: Tiling, measure: Callable[[Floats], None] | None = None
) -> Floats:
    """Decode float32, such as [1, c, h, w] to [1, k, h * factor, w * factor].

    Neighbouring tiles overlap and are blended with linear ramps, as diffusers' tiled decode does. All
    tiles have one shape. A latent that fits into one tile is decoded whole and exactly; in a tiled one the decoder's
    normalisation and attention see a tile instead of the whole, so colours differ slightly. `measure`: is
    given the latent as small as a tile, before those.
    """
    tile, overlap, axes = tiling.tile, tiling.overlap, tiling.axes
    sizes = [latent.shape[axis.input] for axis in axes]
    if all(size <= tile for size in sizes):
        return decode(latent)
    if measure:
        measure(_shrink(latent, tiling))
    total = weights = np.zeros(0, np.float32)
    for starts in product(*(_starts(size, tile, overlap) for size in sizes)):
        cells: list[Any] = [np.s_[:]] * latent.ndim
        for axis, start in zip(axes, starts, strict=True):
            cells[axis.input] = slice(start, start + tile)
        piece = decode(np.ascontiguousarray(latent[tuple(cells)]))
        _check_size(piece, latent, tiling)
        window = np.ones([1] * piece.ndim, np.float32)
        area: list[Any] = [np.s_[:]] * piece.ndim
        for axis, start, size in zip(axes, starts, sizes, strict=True):
            shape = [-1 if dim == axis.output else 1 for dim in range(piece.ndim)]
            window = window * _ramp(start, tile, size, overlap, axis.factor).reshape(shape)
            area[axis.output] = slice(start * axis.factor, start * axis.factor + piece.shape[axis.output])
        if not total.size:
            whole = {axis.output: size * axis.factor for axis, size in zip(axes, sizes, strict=True)}
            total = np.zeros([whole.get(dim, size) for dim, size in enumerate(piece.shape)], np.float32)
            weights = np.zeros([whole.get(dim, 1) for dim in range(piece.ndim)], np.float32)
        total[tuple(area)] += piece * window
        weights[tuple(area)] += window
    picture: Floats = np.divide(total, weights, out=total)
    return picture


def _shrink(latent: Floats, tiling: Tiling) -> Floats:
    """Some of its cells, at equal distances, so that their distribution is that of all."""
    for axis in tiling.axes:
        size = latent.shape[axis.input]
        kept = min(tiling.tile, size)
        latent = latent.take(np.arange(kept) * size // kept, axis.input)
    return np.ascontiguousarray(latent)


def _check_size(piece: Floats, latent: Floats, tiling: Tiling) -> None:
    """ArtifactError where a tile is not as large as the manifest says."""
    for axis in tiling.axes:
        size = min(tiling.tile, latent.shape[axis.input])
        found = piece.shape[axis.output] if axis.output < piece.ndim else 0
        if found != size * axis.factor:
            raise ArtifactError(
                f"the decoder gives {found} cells for {size}, where tiles say {size * axis.factor}",
                hint="the engine is not of this manifest: compile the bundle again",
            )


def count_tiles(tiling: Tiling, shape: tuple[int, ...]) -> int:
    """How many tiles an input of this shape is."""
    return len(list(product(*(_starts(shape[axis.input], tiling.tile, tiling.overlap) for axis in tiling.axes))))


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """First cells of the tiles along one axis; the last tile ends where the latent does."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(start: int, tile: int, size: int, overlap: int, factor: int) -> Floats:
    """Weights of a tile's pixels along one axis: rising and falling over the overlap, but not at the picture's edge."""
    length = min(tile, size) * factor
    rise = (np.arange(overlap * factor, dtype=np.float32) + 0.5) / max(1, overlap * factor)
    weights = np.ones(length, np.float32)
    if overlap and start > 0:
        weights[: len(rise)] = rise
    if overlap and start + tile < size:
        weights[-len(rise) :] = np.minimum(weights[-len(rise) :], rise[::-1])
    return weights
