"""Stop an image when what it will become has stopped changing: around `denoise`, so that samplers know nothing of it.

D(x, sigma) is the clean image that the denoiser expects. Once it changes little from one evaluation to the next, it is
taken for the result, and the image is evaluated no more. Each image decides for itself, and is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class EarlyExit:
    """D(x, sigma) for one run of a sampler on arrays [n, ...].

    `left`: the images that go on. The others' rows of what `denoise` returns are not looked at: they need no
    evaluation, and keep the D that they stopped at. `steps`: how many each image has taken.
    """

    def __init__(self, denoise: Callable[[Floats, float], Floats], threshold: float | None, images: int) -> None:
        """`threshold`: of `change`, at or below which an image stops; None: none stops."""
        self._denoise, self._threshold = denoise, threshold
        self._last: Floats | None = None
        self.left = self._in_step = np.arange(images)
        self.steps = np.zeros(images, int)

    def __call__(self, x: Floats, sigma: float) -> Floats:
        if self._last is not None and not self.left.size:  # within the step in which the last one stopped
            return self._last.copy()
        denoised = self._denoise(x, sigma)
        if self._threshold is None:
            return denoised
        if self._last is None:
            self._last = denoised.copy()
            return denoised
        changes = change(denoised[self.left], self._last[self.left])
        self._last[self.left] = denoised[self.left]
        self.left = self.left[~(changes <= self._threshold)]  # NaN goes on, and is found after the step
        return self._last.copy()

    def end_step(self) -> bool:
        """Count a step for the images that took it; whether any image goes on."""
        self.steps[self._in_step] += 1
        self._in_step = self.left
        return bool(self.left.size)

    def results(self, latents: Floats) -> Floats:
        """The sampler's latents, but for images that stopped: what they stopped at."""
        stopped = np.setdiff1d(np.arange(len(latents)), self.left)
        if self._last is not None:
            latents[stopped] = self._last[stopped]
        return latents


def change(now: Floats, before: Floats) -> npt.NDArray[np.float64]:
    """[n]: how far two clean images [n, ...] are apart, relative to the size of the first (RMS over cells of each)."""
    flat = [each.reshape(len(each), -1).astype(np.float64) for each in (now - before, now)]
    apart, size = (np.sqrt((each**2).mean(axis=1)) for each in flat)
    return np.asarray(apart / np.maximum(size, np.finfo(np.float32).tiny))
