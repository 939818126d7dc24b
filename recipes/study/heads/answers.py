"""The study's statistics: every figure of the report, from the document alone.

Intervals are of 95 %, by the bootstrap over prompts and seeds at once: both are resampled, each for itself, and a
picture is drawn as often as its prompt and its seed are (the pigeonhole bootstrap; Owen, Annals of Applied Statistics,
2007). What has the same prompts stays paired, and what has the same seeds too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, spearmanr

from heads.cases import held_out
from heads.recipe import GENERIC

Array = npt.NDArray[np.float64]  # [seeds, prompts]
Interval = dict[str, float]  # value, low, high
Means = Sequence[Array]  # means of a group's arrays, [resamples] each

LIMIT = 0.02  # the largest drop of the CLIP score that counts as none
RESAMPLES = 2000


@dataclass(frozen=True)
class Mask:
    """A way to choose heads, whatever the ratio and the seed."""

    criterion: str
    correct: bool = False
    calibration: str | None = None
    recovered: bool = False

    @property
    def title(self) -> str:
        """Without the calibration."""
        return self.criterion + " + correction" * self.correct + " + recovery" * self.recovered


class Data:
    """The document, by mask, ratio and set of prompts."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.seeds: list[int] = document["recipe"]["seeds"]
        self.families: list[str] = list(document["families"])
        self._records = {
            (Mask(r["criterion"], r["correct"], r["calibration"], r["recovered"]), r["ratio"], r["seed"]): r
            for r in document["records"]
        }
        self.masks = list(dict.fromkeys(mask for mask, *_ in self._records))

    def ratios(self, mask: Mask) -> list[float]:
        """At which it was judged, rising."""
        return sorted({ratio for found, ratio, _ in self._records if found == mask})

    def has(self, mask: Mask, name: str) -> bool:
        """Whether it was judged on this set."""
        return any(found == mask and name in record["sets"] for (found, *_), record in self._records.items())

    def before(self, name: str) -> Array:
        """CLIP scores of the unpruned model."""
        return np.array([self.document["originals"][name][str(seed)] for seed in self.seeds])

    def after(self, mask: Mask, ratio: float, name: str, metric: str = "clip") -> Array:
        """CLIP scores, or PSNR to the unpruned model's pictures in dB (metric: clip or psnr)."""
        return np.array([self._records[mask, ratio, seed]["sets"][name][metric] for seed in self.seeds])

    def removed(self, mask: Mask, ratio: float, seed: int) -> set[int]:
        """Numbers of the heads that went."""
        total = sum(self.document["heads"].values())
        bits = int(self._records[mask, ratio, seed]["removed"], 16)
        return {head for head in range(total) if bits >> (total - 1 - head) & 1}


def interval(statistic: Callable[[Sequence[Means]], Array], groups: Sequence[Sequence[Array]]) -> Interval:
    """The statistic of the groups' means, with its interval. Arrays of one group share prompts; all share seeds.

    scipy.stats.bootstrap resamples one axis of its samples, not two at once.
    """
    random, seeds = np.random.default_rng(0), len(groups[0][0])
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    found: list[Means] = []
    for group in groups:
        prompts = group[0].shape[1]
        by_prompt = random.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) / prompts
        found.append([((by_seed @ array) * by_prompt).sum(1) for array in group])
    value = statistic([[np.array([array.mean()]) for array in group] for group in groups])
    low, high = np.percentile(statistic(found), [2.5, 97.5])
    return {"value": float(value[0]), "low": float(low), "high": float(high)}


def change(data: Data, mask: Mask, ratio: float, name: str) -> Interval:
    """Relative change of the mean CLIP score."""
    group = [data.before(name), data.after(mask, ratio, name)]
    return interval(lambda g: g[0][1] / g[0][0] - 1, [group])


def distance(data: Data, mask: Mask, ratio: float, name: str) -> Interval:
    """Mean PSNR to the unpruned model's pictures, dB."""
    return interval(lambda g: np.asarray(g[0][0]), [[data.after(mask, ratio, name, "psnr")]])


def tolerance(data: Data, mask: Mask, name: str) -> dict[str, Any] | None:
    """H1: the largest ratio up to which the mean CLIP score drops by at most LIMIT, at it and at all below it.

    `sure`: the same for the interval's lower end. None where the smallest ratio costs more.
    """
    best, sure, certain = None, None, True
    for ratio in data.ratios(mask):
        found = change(data, mask, ratio, name)
        if found["value"] < -LIMIT:
            break
        certain = certain and found["low"] >= -LIMIT
        sure = ratio if certain else sure
        best = {"ratio": ratio, "change": found, "psnr": distance(data, mask, ratio, name)}
    return best and {**best, "sure": sure}


def which(
    data: Data, families: Sequence[str], criterion: str, correct: bool, ratios: Sequence[float], metric: str
) -> Interval:
    """Q1: the family's mask minus the generic one on the family's held-out prompts, same noise; mean over families and
    ratios. `metric`: clip (relative change) or psnr (dB)."""
    groups = []
    for family in families:
        masks, name = [Mask(criterion, correct, of) for of in (family, GENERIC)], held_out(family)
        groups.append([data.before(name), *(data.after(m, r, name, metric) for r in ratios for m in masks)])

    def statistic(found: Sequence[Means]) -> Array:
        gaps = [(g[i] - g[i + 1]) / (g[0] if metric == "clip" else 1.0) for g in found for i in range(1, len(g), 2)]
        return np.asarray(np.mean(gaps, axis=0))

    return interval(statistic, groups)


def contrast(data: Data, a: tuple[Mask, str], b: tuple[Mask, str], ratios: Sequence[float]) -> Interval:
    """Q2: CLIP change of mask a on set a minus that of b on b, other prompts but the same seeds; mean over ratios."""
    groups = [[data.before(name), *(data.after(mask, r, name) for r in ratios)] for mask, name in (a, b)]

    def statistic(found: Sequence[Means]) -> Array:
        first, second = (np.mean(g[1:], axis=0) / g[0] for g in found)
        return np.asarray(first - second)

    return interval(statistic, groups)


def agreement(data: Data, criterion: str, correct: bool, family: str, other: str) -> dict[str, float] | None:
    """How alike the masks of two calibrations are: rank correlation (Spearman) and, at the middle ratio, the share of
    heads that both remove of those that either does (Jaccard); means over pairs of seeds. None without a pair."""
    ranks, a, b = data.document["ranks"][criterion], Mask(criterion, correct, family), Mask(criterion, correct, other)
    pairs = [(s, t) for s in data.seeds for t in data.seeds if family != other or s < t]
    if not pairs:
        return None
    ratios = data.ratios(a)
    ratio = ratios[len(ratios) // 2]
    correlations = [spearmanr(ranks[family][str(s)], ranks[other][str(t)]).statistic for s, t in pairs]
    overlaps = [
        len(x & y) / len(x | y) for s, t in pairs for x, y in [(data.removed(a, ratio, s), data.removed(b, ratio, t))]
    ]
    return {"ratio": ratio, "spearman": float(np.mean(correlations)), "jaccard": float(np.mean(overlaps))}


def passing(data: Data, mask: Mask, ratio: float, name: str) -> dict[str, Any]:
    """H3: how many prompts of a set lose at most LIMIT of their CLIP score, mean over seeds; with Wilson's interval."""
    before, after = data.before(name).mean(0), data.after(mask, ratio, name).mean(0)
    kept, total = int((after - before >= -LIMIT * np.abs(before)).sum()), len(before)
    return {"kept": kept, "total": total, **wilson(kept, total)}


def wilson(kept: int, total: int) -> Interval:
    """A share with its interval of 95 % (Wilson, 1927)."""
    found = binomtest(kept, total).proportion_ci(method="wilson")
    return {"value": kept / total, "low": float(found.low), "high": float(found.high)}


def noise_floor(data: Data, name: str) -> float | None:
    """How far the unpruned model's mean CLIP score is from seed to seed: its largest distance from the mean of all,
    relative; None of one seed. No change below it would be seen between two runs."""
    means = data.before(name).mean(1)
    return float(np.abs(means / means.mean() - 1).max()) if len(means) > 1 else None
