"""How far a quantised denoiser is off, and which of its layers to keep in higher precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.denoiser import guide
from slipcast.errors import NumericalError
from slipcast.progress import Advance

JUDGED, RANKED = 8, 4  # samples that the error is measured on, and that layers are ranked by


@dataclass(frozen=True)
class Found:
    """`errors`: of each layer quantised alone, where they had to be measured; `error_all`: of all of them together."""

    quantised: frozenset[str]
    kept: tuple[str, ...]
    error: float
    error_all: float
    errors: dict[str, float]


def search(
    layers: frozenset[str], error: Callable[[frozenset[str], int], float], limit: float, advance: Advance
) -> Found:
    """Quantise as many layers as `limit` allows. `error(layers, samples)` measures a choice of them.

    Errors of single layers are taken to add up as independent noise does, in squares. So the layers that are worst
    alone are kept until what is left adds up to the limit; as it never quite does, the sum is scaled by what was
    measured and more are kept, until the measured error is at or below the limit, or no layer is left.
    """
    error_all = measured = error(layers, JUDGED)
    if measured <= limit:
        return Found(layers, (), measured, measured, {})
    errors = {}
    for done, layer in enumerate(sorted(layers)):
        advance(done, len(layers))
        errors[layer] = error(frozenset({layer}), RANKED)
    worst_first = sorted(errors, key=lambda layer: -errors[layer])
    kept = 0
    while measured > limit and kept < len(worst_first):
        left = [errors[layer] ** 2 for layer in worst_first[kept:]]
        allowed = sum(left) * (limit / measured) ** 2
        kept += 1  # at least one, also where single layers do not show the error of all
        while sum(left := left[1:]) > allowed:
            kept += 1
        measured = error(frozenset(worst_first[kept:]), JUDGED)
    return Found(frozenset(worst_first[kept:]), tuple(worst_first[:kept]), measured, error_all, errors)


def prediction_error(
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]], samples: Path, guidance: float, count: int = JUDGED
) -> float:
    """How far the guided predictions of `run` are from the samples', |difference| / |prediction| over `count` of them.

    Raises NumericalError where they are not finite.
    """
    files = sorted(samples.glob("*.npz"))
    places = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    difference = norm = 0.0
    for file in (files[place] for place in places):
        with np.load(file) as arrays:
            inputs = dict(arrays)
        wanted = _guided(inputs.pop("prediction"), guidance)
        found = _guided(run(inputs)["prediction"], guidance)
        difference += float(np.square(found - wanted).sum())
        norm += float(np.square(wanted).sum())
    if not np.isfinite(difference):
        raise NumericalError(
            "the quantised denoiser's prediction is not finite", expected="finite numbers", got=difference
        )
    return float(np.sqrt(difference / norm))


def _guided(prediction: npt.NDArray[Any], guidance: float) -> npt.NDArray[np.float64]:
    whole = prediction.astype(np.float64)
    if guidance <= 1.0:
        return whole
    unconditional, conditional = np.split(whole, 2)
    guided: npt.NDArray[np.float64] = guide(conditional, unconditional, guidance)
    return guided
