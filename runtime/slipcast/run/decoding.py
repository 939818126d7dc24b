"""Decode with the memory that there is: whole, then alone in memory, then in ever smaller tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable

from slipcast.bundle.manifest import ImageGeometry
from slipcast.engines.resources import out_of_memory
from slipcast.run.tiling import Floats, decode_tiled

logger = logging.getLogger("slipcast")

SMALLEST_TILE = 8  # latent cells: below, pictures suffer more from tiling than memory gains


def decode_frugally(
    decode: Callable[[Floats], Floats], latent: Floats, image: ImageGeometry, free: Callable[[], None]
) -> Floats:
    """As decode_tiled with the tiles of `image`; where memory runs out, again after `free()`, then in smaller tiles.

    Colours of what is tiled differ slightly: see decode_tiled. Where no tile is small enough, the last error is raised.
    """
    attempts = [(image.tile, image.overlap)] * 2
    size = min(image.tile, *latent.shape[2:]) // 2
    while size >= SMALLEST_TILE:
        attempts.append((size, min(image.overlap, size // 4)))
        size //= 2
    for number, (tile, overlap) in enumerate(attempts):
        if number == 1:
            logger.warning("memory ran out while decoding: trying again without other engines in memory")
            free()
        elif number:
            logger.warning("memory ran out while decoding: trying again in tiles of %d latent cells", tile)
        try:
            return decode_tiled(decode, latent, tile, overlap, image.factor)
        except Exception as error:
            if not out_of_memory(error) or number == len(attempts) - 1:
                raise
    raise AssertionError("there are attempts")
