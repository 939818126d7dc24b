"""What a bundle's evidence consists of: distances between pictures, memory and time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slipcast.bundle.names import Count, Name, Positive, Sha256
from slipcast.bundle.validation import Strict


class Metrics(Strict, allow_inf_nan=True):  # what is not a number has to reach the gate; no manifest can hold it
    """Distances between two sets of pictures of the same prompts; null means that the metric was not run.

    clip_delta is relative, (score - reference score) / reference score: negative is worse. Retrieval is the share of
    pictures for which the scorer finds their own among the family's captions; its drop is a difference of such shares,
    and negative is better. LPIPS and FLIP are 0 for equal pictures. PSNR in dB on [0, 1].
    """

    clip_score_mean: float | None = None
    clip_delta_mean: float | None = None
    clip_delta_worst: float | None = None
    retrieval_precision: float | None = None
    retrieval_drop: float | None = None
    lpips_mean: float | None = None
    flip_mean: float | None = None
    ssim_mean: float | None = None
    ssim_worst: float | None = None
    psnr_mean: float | None = None
    psnr_worst: float | None = None


class Comparison(Metrics):
    """The bundle against the original on `images` prompts.

    `original`: what can be said of the original alone. `intervals`: metric -> 95 % bootstrap interval over the images.
    """

    images: Positive
    original: Metrics = Metrics()
    intervals: dict[Name, tuple[float, float]] = Field(default_factory=dict)


class Quality(Comparison):
    """The comparison on held-out prompts, with the noise floors no difference below which counts.

    `precision`: the unchanged model in bf16 against fp32. `seed`: the unchanged model with another seed. The digests
    are those of the weights that judged, the captions the number that retrieval chose from.
    """

    noise_floor: dict[Literal["precision", "seed"], Metrics]
    out_of_family: Comparison | None = None
    scorer_sha256: Sha256 | None = None
    lpips_sha256: Sha256 | None = None
    retrieval_captions: Count = 0


class Performance(Strict):
    """One image, whole pipeline, on the machine that compiled, after one that is not counted. Medians. `full`: of the
    original, null where this machine did not draw it. `residency`: where engines were opened one after the other, as
    memory had no room for all, their opening is in the seconds.

    Memory: peak resident megabytes (1e6 bytes) of the process; by component, what opening and running it adds.
    """

    peak_memory_full_mb: float | None
    peak_memory_bundle_mb: float
    latency_full_s: float | None
    latency_bundle_s: float
    load_s: float
    residency: Literal["all", "sequential"] = "all"
    components_memory_mb: dict[str, float] = Field(default_factory=dict)
    components_s: dict[str, float] = Field(default_factory=dict)
