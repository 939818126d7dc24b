"""How far pictures are from those of the same prompts and noise: metrics of each image, their means, their intervals.

Pictures are float32 [n, h, w, 3] in [0, 1]. One picture that is not finite makes every metric of the set NaN.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Metrics
from slipcast_compiler.judge.lpips import Lpips
from slipcast_compiler.judge.scorer import Scorer

Floats = npt.NDArray[np.float32]
Samples = dict[str, npt.NDArray[np.float64]]  # metric -> its value for each image; what was not run is not there
MAX_PSNR = 100.0  # of equal pictures, whose PSNR is infinite, which JSON does not have
RESAMPLES = 2000
SSIM_WINDOW = 11  # pixels
DISTRACTORS = 64  # captions that retrieval chooses from, besides a picture's own


def psnr(a: Floats, b: Floats) -> float:
    """In dB, of two pictures in [0, 1]; at most MAX_PSNR, and NaN where a picture is not finite."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return MAX_PSNR if error == 0 else min(-10 * float(np.log10(error)), MAX_PSNR)


def ssim(a: Floats, b: Floats) -> float:
    """Structural similarity with the Gaussian window of Wang et al., 2004, as most papers give it. What is smaller than
    the window is continued by its mirror image."""
    from skimage.metrics import structural_similarity

    missing = [(0, max(0, SSIM_WINDOW - size)) for size in a.shape[:2]]
    a, b = (np.pad(picture, (*missing, (0, 0)), mode="symmetric") for picture in (a, b))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, channel_axis=-1, data_range=1.0, **window))  # type: ignore[no-untyped-call]


def flip(a: Floats, b: Floats) -> float:
    """Mean error, 0 to 1, that the eye sees on flipping between two pictures (Andersson et al., HPG 2020).

    By its authors' library, as seen from 0.7 m on a display of 3840 pixels over 0.7 m, their default.
    """
    from flip_evaluator import evaluate

    first, second = (np.ascontiguousarray(picture, np.float32) for picture in (a, b))
    return float(evaluate(first, second, "LDR", applyMagma=False)[1])


def retrieved(pictures: Floats, own: Floats, captions: Floats) -> npt.NDArray[np.bool_] | None:
    """Whether each picture [n, d] is closer to its own caption [n, d] than to any other of `captions` [m, d].

    Captions with equal embeddings are one caption. None where no picture has another one to choose.
    """
    same = np.stack([(captions == each).all(-1) for each in own]) if len(captions) else np.ones((len(own), 0), bool)
    if same.all():
        return None
    best = np.where(same, -np.inf, pictures @ captions.T).max(-1)
    found: npt.NDArray[np.bool_] = (pictures * own).sum(-1) > best
    return found


def choose_captions(prompts: Sequence[str]) -> tuple[str, ...]:
    """At most DISTRACTORS of the prompts, in an order that does not depend on theirs."""
    ranked = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return tuple(ranked[:DISTRACTORS])


def interval(
    samples: Sequence[npt.NDArray[Any]], statistic: Callable[..., Any], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, float]:
    """The statistic of paired samples with its percentile bootstrap interval of 95 % (Efron and Tibshirani, 1993).

    `statistic(*arrays [r, n])` reduces the last axis; images are resampled, the pairing is kept.
    """
    # scipy.stats.bootstrap draws the same, takes half as long again, and refuses a single image.
    stacked = [np.asarray(sample, np.float64) for sample in samples]
    drawn = np.random.default_rng(seed).integers(0, len(stacked[0]), (resamples, len(stacked[0])))
    low, high = np.percentile(statistic(*(sample[drawn] for sample in stacked)), [2.5, 97.5])
    return {"value": float(statistic(*(sample[None] for sample in stacked))[0]), "low": float(low), "high": float(high)}


def _mean(x: Any) -> Any:
    return x.mean(-1)


# metric of the manifest -> the samples it is taken from, and how, over the last axis. A new one is a line here, and a
# field of Metrics.
STATISTICS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "clip_score_mean": (("clip",), _mean),
    # of the means, not the mean of ratios, which a single score near zero would rule
    "clip_delta_mean": (("clip_before", "clip"), lambda a, b: (b.mean(-1) - a.mean(-1)) / np.abs(a.mean(-1))),
    "clip_delta_worst": (("clip_before", "clip"), lambda a, b: ((b - a) / np.abs(a)).min(-1)),
    "retrieval_precision": (("retrieval",), _mean),
    "retrieval_drop": (("retrieval_before", "retrieval"), lambda a, b: a.mean(-1) - b.mean(-1)),
    "lpips_mean": (("lpips",), _mean),
    "flip_mean": (("flip",), _mean),
    "ssim_mean": (("ssim",), _mean),
    "ssim_worst": (("ssim",), lambda x: x.min(-1)),
    "psnr_mean": (("psnr",), _mean),
    "psnr_worst": (("psnr",), lambda x: x.min(-1)),
}


def summarise(samples: Samples) -> Metrics:
    """The metrics whose samples there are."""
    found = {}
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # NaN is the result where it is the input
        for name, (needs, statistic) in STATISTICS.items():
            if all(need in samples for need in needs):
                found[name] = float(statistic(*(samples[need] for need in needs)))
    return Metrics(**found)


def intervals(samples: Samples) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of means and drops, over images. Of a worst image, or of one image, there is none."""
    found = {}
    for name, (needs, statistic) in STATISTICS.items():
        chosen = [samples[need] for need in needs if need in samples]
        if name.endswith("_worst") or len(chosen) < len(needs) or len(chosen[0]) < 2:
            continue
        if all(np.isfinite(sample).all() for sample in chosen):
            made = interval(chosen, statistic)
            found[name] = (made["low"], made["high"])
    return found


class Reference:
    """The pictures that others are measured against, with what has to be computed of them once."""

    def __init__(
        self,
        images: Floats,
        prompts: Sequence[str | None],
        scorer: Scorer | None = None,
        lpips: Lpips | None = None,
        captions: Sequence[str] = (),
    ) -> None:
        """`captions`: what retrieval chooses from; without a scorer neither it nor the CLIP score is run."""
        self._images, self._scorer, self._lpips = images, scorer, lpips
        self._before: Samples = {}
        if scorer:
            # in one call, within which equal texts are bit-equal; `retrieved` takes them for one caption then
            texts = scorer.embed_texts([*prompts, *captions])
            self._own, self._captions = texts[: len(prompts)], texts[len(prompts) :]
            self._before = self._against_text(images)

    def measure(self, found: Floats) -> Metrics:
        """The metrics of pictures of the same prompts and noise."""
        return summarise(self.sample(found))

    def sample(self, found: Floats, *, pixels: bool = True) -> Samples:
        """As measure, for each image; without those of pixels, which mean nothing for pictures of another noise."""
        broken = np.array([not np.isfinite(image).all() for image in found])
        found = np.where(broken[:, None, None, None], np.float32(0), found)
        samples = self._against_text(found) if self._scorer else {}
        if pixels:
            pairs = list(zip(self._images, found, strict=True))
            samples |= {m.__name__: np.array([m(a, b) for a, b in pairs]) for m in (psnr, ssim, flip)}
            if self._lpips:
                samples["lpips"] = self._lpips(self._images, found).astype(np.float64)
        for values in samples.values():
            values[broken] = np.nan
        return samples | {f"{name}_before": values for name, values in self._before.items()}

    def _against_text(self, images: Floats) -> Samples:
        assert self._scorer
        pictures = self._scorer.embed_pictures(images)
        samples = {"clip": (pictures * self._own).sum(-1).astype(np.float64)}
        right = retrieved(pictures, self._own, self._captions)
        return samples if right is None else samples | {"retrieval": right.astype(np.float64)}
