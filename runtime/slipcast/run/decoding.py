"""Decode with the memory that there is: whole, then alone in memory, then in ever smaller tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable

from slipcast.bundle.tiles import MULTIPLE, Tiling
from slipcast.engines.resources import out_of_memory
from slipcast.run.tiling import Floats, decode_tiled

logger = logging.getLogger("slipcast")


def decode_frugally(
    decode: Callable[[Floats], Floats], latent: Floats, tiling: Tiling, free: Callable[[], None],
    measure: Callable[[Floats], None] | None = None,
) -> Floats:  # fmt: skip
    """As decode_tiled; where memory runs out, again after `free()`, then in smaller tiles.

    Colours of what is tiled differ slightly: see decode_tiled. Where no tile is small enough, the last error is raised.
    """
    attempts = [tiling] * 2
    size = min(tiling.tile, *(latent.shape[axis.input] for axis in tiling.axes)) // 2
    while size >= tiling.smallest:
        size = max(tiling.smallest, size - size % MULTIPLE if size > MULTIPLE else size)
        smaller = {"tile": size, "overlap": min(tiling.overlap, size // 4)}
        attempts.append(tiling.model_copy(update=smaller))
        size //= 2
    for number, attempt in enumerate(attempts):
        if number == 1:
            logger.warning("memory ran out while decoding: trying again without other engines in memory")
            free()
        elif number:
            logger.warning("memory ran out while decoding: trying again in tiles of %d latent cells", attempt.tile)
        try:
            return decode_tiled(decode, latent, attempt, measure)
        except Exception as error:
            if not out_of_memory(error) or number == len(attempts) - 1:
                raise
    raise AssertionError("there are attempts")
