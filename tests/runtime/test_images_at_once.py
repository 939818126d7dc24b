"""How many images go through a CPU's denoiser in one call: so many as need little memory for attention."""

from __future__ import annotations

import pytest

from slipcast.bundle.manifest import ImageGeometry
from slipcast.run.loop import images_at_once

HEADS, ROWS, FLOAT = 8, 2, 4


def _image(cells: int) -> ImageGeometry:
    return ImageGeometry(width=8 * cells, height=8 * cells, channels=4, factor=8, tile=64, overlap=16)


@pytest.mark.parametrize(("cells", "most"), [(8, 256), (16, 16), (24, 3), (31, 1), (32, 1), (64, 1), (128, 1)])
def test_more_than_one_only_where_their_scores_fit_into_64_megabytes(cells: int, most: int) -> None:
    found = images_at_once(_image(cells), "cpu", 1000)
    assert found == most
    scores = ROWS * HEADS * FLOAT * cells**4
    assert found == 1 or found * scores <= 64 * 2**20 < (found + 1) * scores
    assert images_at_once(_image(cells), "cpu", 1) == 1
    assert images_at_once(_image(cells), "cuda", 1000) == 1000
