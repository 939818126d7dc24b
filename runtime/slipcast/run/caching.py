"""Feature caching: at some steps a shallow denoiser goes on from what the full one computed at an earlier step.

Deep features change slowly from step to step (DeepCache: Ma et al., arXiv 2312.00858). A bundle with `caching` has two
engines of one denoiser: the full one also gives the features that cross the cut, and `denoiser_shallow` takes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Caching

Floats = npt.NDArray[np.float32]


class Features:
    """What the last full evaluation of a run gave, for each image and branch; and which evaluations are full."""

    def __init__(self, record: Caching, images: int) -> None:
        self._record, self._images = record, images
        self._evaluation = 0
        self._both = False  # whether the features are those of both branches
        self._kept: dict[str, Floats] = {}  # [branches, images, ...], the conditional branch last
        self._taken: dict[tuple[bool, bytes], dict[str, Floats]] = {}

    def begin(self, both: bool) -> bool:
        """Begin an evaluation, of both branches or of the conditional one alone: whether it has to be a full one.

        It has where the mask says so, or says nothing any more, and where features of a branch are missing: one is not
        used for the other.
        """
        mask = self._record.mask[self._evaluation : self._evaluation + 1]
        full = mask != (False,) or (both and not self._both)
        self._evaluation += 1
        if full:
            self._both = both
            self._kept.clear()
            self._taken.clear()
        return full

    def keep(self, images: npt.NDArray[np.int_], outputs: Mapping[str, Floats]) -> None:
        """The features of some images, out of what a full evaluation of them gave: unconditional rows first."""
        for spec in self._record.features:
            rows = outputs[spec.name]
            rows = rows.reshape(1 + self._both, len(images), *rows.shape[1:])
            if spec.name not in self._kept:
                self._kept[spec.name] = np.empty((len(rows), self._images, *rows.shape[2:]), rows.dtype)
            self._kept[spec.name][:, images] = rows

    def of(self, images: npt.NDArray[np.int_], both: bool) -> dict[str, Floats]:
        """The features of these images, as rows; the same arrays for as long as they are the same."""
        key = both, images.tobytes()
        if key not in self._taken:
            first = 0 if both else -1
            rows = {name: kept[first:, images] for name, kept in self._kept.items()}
            self._taken[key] = {name: each.reshape(-1, *each.shape[2:]) for name, each in rows.items()}
        return self._taken[key]
