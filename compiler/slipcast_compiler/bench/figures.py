"""Arithmetic of a benchmark: ratios pair by pair, break-even, and quality with bootstrap intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from slipcast_compiler.judge.metrics import interval, psnr, ssim

Floats = npt.NDArray[np.float32]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(peer: Sequence[float], bundle: Sequence[float]) -> dict[str, float]:
    """Spread of peer / bundle, image by image.

    A peer that made fewer images is slow: what the machine did in its half minute, one image of the bundle beside it
    does not tell. Its images are divided by the median of all the bundle's.
    """
    if len(peer) < len(bundle):
        bundle = [statistics.median(bundle)] * len(peer)
    pairs = [theirs / ours for theirs, ours in zip(peer, bundle, strict=True)]
    return {**spread(pairs), "pairs": len(pairs)}


def break_even(compile_s: float, peer_s: float, bundle_s: float) -> int | None:
    """Images after which compiling has paid for itself; None where the bundle is not faster."""
    return math.ceil(compile_s / (peer_s - bundle_s)) if bundle_s < peer_s else None


def quality(
    reference: Floats, found: Floats, scores: tuple[Floats, Floats] | None, *, pixels: bool, seed: int = 0
) -> dict[str, dict[str, float] | None]:
    """PSNR, SSIM and relative change of the CLIP score against the reference's pictures of the same prompts and noise.

    `scores`: of reference and found. What was not run is None.
    """
    result: dict[str, dict[str, float] | None] = dict.fromkeys(("psnr_mean", "ssim_mean", "clip_delta_mean"))
    reference = reference[: len(found)]
    if pixels:
        for name, metric in (("psnr_mean", psnr), ("ssim_mean", ssim)):
            values = np.array([metric(a, b) for a, b in zip(reference, found, strict=True)])
            result[name] = interval([values], lambda x: x.mean(-1), seed)
    if scores:
        before, after = scores
        # of the means, as in metrics.STATISTICS
        result["clip_delta_mean"] = interval(
            [before[: len(after)], after], lambda x, y: y.mean(-1) / x.mean(-1) - 1, seed
        )
    return result
