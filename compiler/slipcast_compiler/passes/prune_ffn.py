"""Remove neurons of feed-forward layers. The two halves of a gated one (GEGLU, SwiGLU) lose the same neurons.

What it does not understand, it leaves alone, and the report says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slipcast_compiler.passes.context import Context, Floats, Result
from slipcast_compiler.passes.units import damped, keep_units, matrix, moment_of, select
from slipcast_compiler.recipe.passes import PruneFFN

if TYPE_CHECKING:
    from slipcast_compiler.model.layers import FeedForwardLayer
    from slipcast_compiler.model.rewrite import Denoiser


def run(denoiser: Denoiser, context: Context, options: PruneFFN) -> Result:
    """See the module's docstring."""
    layers = denoiser.layers.feed_forward
    report: dict[str, Any] = {
        "options": options.model_dump(mode="json"), "left_alone": dict(denoiser.layers.unknown_feed_forward)
    }  # fmt: skip
    if options.ratio == 0 or not layers:
        counts = {layer.name: {"neurons": layer.neurons, "kept": layer.neurons} for layer in layers}
        return Result(report={**report, "retention": 1.0, "layers": counts})
    scores = {layer.name: _scores(denoiser, context, options, layer) for layer in layers}
    kept = select(scores, options.ratio, options.floor, options.protect, "prune_ffn")
    tensors: dict[str, Floats] = {}
    counts = {}
    for layer in layers:
        stay = _rounded(scores[layer.name], len(kept[layer.name]), options.multiple)
        counts[layer.name] = {"neurons": layer.neurons, "kept": len(stay)}
        if len(stay) < layer.neurons:
            tensors |= keep_units(denoiser, layer, stay, context.measured if options.correct else None)
    total = sum(layer.neurons for layer in layers)
    return Result(tensors, {**report, "retention": sum(c["kept"] for c in counts.values()) / total, "layers": counts})


def _scores(denoiser: Denoiser, context: Context, options: PruneFFN, layer: FeedForwardLayer) -> Floats:
    """Importance of each neuron, float32 [neurons]."""
    if options.criterion == "random":
        digest = np.frombuffer(layer.name.encode(), np.uint8)
        return np.random.default_rng([options.seed, *digest]).random(layer.neurons, np.float32)
    (down,), every = layer.columns, range(layer.neurons)
    weight = matrix(denoiser, down.linear)[:, down.places(every)]
    if options.criterion == "magnitude":
        up = np.stack([matrix(denoiser, place.linear)[place.places(every)] for place in layer.inputs])
        norms: Floats = np.sqrt((weight**2).mean(0) + (up**2).mean((0, 2))).astype(np.float32)
        return norms
    if options.criterion == "second_order":
        # One neuron's cost with the rest corrected, w^2 / [H^-1]_ii; of all at once, as one by one would take hours.
        h = damped(moment_of(context.measured, layer, down))
        wide = weight.astype(np.float64)
        energy = float(np.sum((wide @ h) * wide))
        costs: Floats = ((wide**2).sum(0) / np.diag(np.linalg.inv(h)) / energy).astype(np.float32)
        return costs
    measured: Floats = context.measured.neurons(options.criterion)[layer.name]
    return measured


def _rounded(scores: Floats, count: int, multiple: int) -> tuple[int, ...]:
    """The `count` best, with so many more that their number is a multiple, or all."""
    count = min(len(scores), -(-count // multiple) * multiple)
    return tuple(sorted(np.argsort(-scores, kind="stable")[:count].tolist()))
