"""How a call is evaluated in tiles: of a manifest, and of what a runtime does."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from slipcast.bundle.names import Count, Name, Positive
from slipcast.bundle.validation import Strict

SMALLEST_TILE = 8  # cells: below, pictures suffer more from tiling than memory gains
MULTIPLE = 8  # cells: decoders that make a latent smaller before they make it larger take no odd sizes


class TiledAxis(Strict):
    """A side of tiles. `input`: the dimension of the input; `output`: that of the output; `factor`: how many cells that
    has for each of the input."""

    input: Count
    output: Count
    factor: Positive


class Statistics(Strict):
    """What norms take of the whole, in float32 [size]. `input`: by which an engine is given it, or zeros where it is to
    take its own; `output`: by which it gives what it took; `size`: how many numbers."""

    input: Name
    output: Name
    size: Annotated[int, Field(ge=1, le=1 << 20)]


class Tiling(Strict):
    """A call that is evaluated in overlapping tiles, where its input is larger than one; all else that it takes is the
    same for each tile. `input`: what is cut into tiles; `axes`: along these dimensions; `tile`: their largest side, in
    cells of the input; `overlap`: what neighbours share at least, in the same. `smallest`: the smallest tile that its
    engine takes, of those that are tried where memory runs out. `statistics`: that all tiles have in common: of the
    input, made as small as a tile."""

    input: Name
    axes: Annotated[tuple[TiledAxis, ...], Field(min_length=1)]
    tile: Positive
    overlap: Count
    smallest: Positive
    statistics: Statistics | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.overlap >= self.tile:
            raise ValueError("overlap has to be smaller than the tile")
        if self.smallest > self.tile:
            raise ValueError("smallest is larger than the tile")
        if self.statistics and self.statistics.input == self.input:
            raise ValueError(f"statistics: {self.input!r} is what is cut into tiles")
        for which in ("input", "output"):
            dims = [getattr(axis, which) for axis in self.axes]
            if len(set(dims)) < len(dims):
                raise ValueError(f"axes: two of them are one dimension of the {which}")
        return self
