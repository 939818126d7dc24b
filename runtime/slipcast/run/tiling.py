"""Decode a latent that is larger than the tile, tile by tile, so that memory depends on the tile alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def decode_tiled(decode: Callable[[Floats], Floats], latent: Floats, tile: int, overlap: int, factor: int) -> Floats:
    """Decode float32 [1, c, h, w] to [1, k, h * factor, w * factor]; sizes of tile and overlap in latent cells.

    Neighbouring tiles overlap and are blended with linear ramps, as diffusers' tiled decode does. All
    tiles have one shape. A latent that fits into one tile is decoded whole and exactly; in a tiled one the decoder's
    normalisation and attention see a tile instead of the whole, so colours differ slightly.
    """
    height, width = latent.shape[2:]
    if height <= tile and width <= tile:
        return decode(latent)
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    total: Floats | None = None
    weights = np.zeros((height * factor, width * factor), np.float32)
    for top in rows:
        for left in columns:
            piece = decode(np.ascontiguousarray(latent[:, :, top : top + tile, left : left + tile]))
            window = np.outer(_ramp(top, tile, height, overlap, factor), _ramp(left, tile, width, overlap, factor))
            if total is None:
                total = np.zeros((1, piece.shape[1], *weights.shape), np.float32)
            y, x = top * factor, left * factor
            area = np.s_[..., y : y + piece.shape[2], x : x + piece.shape[3]]
            total[area] += piece * window
            weights[area] += window
    assert total is not None
    picture: Floats = np.divide(total, weights)
    return picture


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
