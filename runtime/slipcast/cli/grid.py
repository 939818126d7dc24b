"""Several pictures as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image


def make_grid(images: Sequence[Image.Image], gap: int = 2) -> Image.Image:
    """Pictures of one size, row by row, in as square a grid as their number allows; a single one stays as it is."""
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid
