"""Tiled decoding: exact for a decoder that looks at one cell at a time; how good it is for a real one is in
tests/bundle/test_images.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipcast.bundle.tiles import TiledAxis, Tiling
from slipcast.run.tiling import count_tiles, decode_tiled

FACTOR = 2


def tiles(tile: int, overlap: int, dims: tuple[int, int] = (2, 3)) -> Tiling:
    axes = tuple(TiledAxis(input=dim, output=dim, factor=FACTOR) for dim in dims)
    return Tiling(input="latent", axes=axes, tile=tile, overlap=overlap, smallest=1)


class Upsample:
    """A linear decoder with no neighbourhood: every cell becomes a square. Remembers the shapes it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, tile: Any) -> Any:
        assert tile.flags.c_contiguous
        assert tile.dtype == np.float32
        self.shapes.append(tile.shape)
        return np.repeat(np.repeat(tile[:, :3] + 1, FACTOR, 2), FACTOR, 3)


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(height * 1000 + width).standard_normal((1, 4, height, width)).astype(np.float32)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.data())
def test_weights_sum_to_one(height: int, width: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    latent, decode = noise(height, width), Upsample()
    picture = decode_tiled(decode, latent, tiles(tile, overlap))
    assert picture.dtype == np.float32
    assert picture.shape == (1, 3, height * FACTOR, width * FACTOR)
    np.testing.assert_allclose(picture, Upsample()(latent), rtol=1e-5, atol=2e-5)
    ((_, _, *sides),) = set(decode.shapes)
    assert all(side <= min(tile, size) for side, size in zip(sides, (height, width), strict=True))
    along = [1 if size <= tile else -(-(size - tile) // (tile - overlap)) + 1 for size in (height, width)]
    assert len(decode.shapes) == along[0] * along[1] == count_tiles(tiles(tile, overlap), latent.shape)


@given(st.integers(1, 16), st.integers(1, 16))
def test_what_fits_is_decoded_once_and_untouched(height: int, width: int) -> None:
    latent, decode = noise(height, width), Upsample()
    picture = decode_tiled(decode, latent, tiles(16, 4))
    assert decode.shapes == [latent.shape]
    np.testing.assert_array_equal(picture, Upsample()(latent))


@pytest.mark.parametrize(
    ("size", "smallest", "side", "count"), [(128, 8, 56, 3), (128, 64, 64, 3), (96, 8, 56, 2), (64, 8, 64, 1)]
)
def test_tiles_are_no_larger_than_as_many_have_to_be(size: int, smallest: int, side: int, count: int) -> None:
    """But for an engine that takes one size; a multiple of 8."""
    decode = Upsample()
    decode_tiled(decode, noise(4, size), tiles(64, 16).model_copy(update={"smallest": smallest}))
    assert decode.shapes == [(1, 4, 4, side)] * count


@pytest.mark.parametrize("overlap", [1, 4, 7])
def test_seams_are_blended(overlap: int) -> None:
    """Tiles that disagree meet in a ramp, not in an edge."""
    count = 0

    def disagree(tile: Any) -> Any:
        nonlocal count
        count += 1
        return np.full((1, 3, tile.shape[2] * FACTOR, tile.shape[3] * FACTOR), count % 2, np.float32)

    row = decode_tiled(disagree, noise(8, 16 - overlap), tiles(8, overlap))[0, 0, 0]
    assert count == 2
    assert (row[0], row[-1]) == (1, 0)
    ramp = row[(8 - overlap) * FACTOR : 8 * FACTOR]
    length = overlap * FACTOR
    np.testing.assert_allclose(ramp, 1 - (np.arange(length) + 0.5) / length, atol=1e-6)


def test_a_tile_that_is_not_finite_shows() -> None:
    def broken(tile: Any) -> Any:
        return np.full((1, 3, tile.shape[2] * FACTOR, tile.shape[3] * FACTOR), np.nan, np.float32)

    assert np.isnan(decode_tiled(broken, noise(20, 20), tiles(8, 2))).all()
