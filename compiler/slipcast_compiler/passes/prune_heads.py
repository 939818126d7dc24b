"""Remove attention heads: smaller projections before and after them, with a count of its own in every layer.

What attention it does not understand, it leaves alone, and the report says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slipcast_compiler.passes.context import Context, Floats, Result
from slipcast_compiler.passes.units import keep_units, moment_of, removal_costs, select
from slipcast_compiler.recipe.passes import PruneHeads

if TYPE_CHECKING:
    from slipcast_compiler.model.layers import AttentionLayer, Layers
    from slipcast_compiler.model.rewrite import Denoiser


def run(denoiser: Denoiser, context: Context, options: PruneHeads) -> Result:
    """See the module's docstring."""
    layers = denoiser.layers
    if options.ratio == 0:
        return Result(report=_report(layers, {}, options))
    kept = select(scores(denoiser, context, options), options.ratio, options.floor, options.protect, "prune_heads")
    tensors: dict[str, Floats] = {}
    for layer in layers.attention:
        if len(kept[layer.name]) < layer.heads:
            tensors |= keep_units(denoiser, layer, kept[layer.name], context.measured if options.correct else None)
    return Result(tensors, _report(layers, kept, options))


def scores(denoiser: Denoiser, context: Context, options: PruneHeads) -> dict[str, Floats]:
    """Importance by layer, float32 [heads]: the larger, the more is lost without the head."""
    layers = denoiser.layers.attention
    if options.criterion == "random":
        generator = np.random.default_rng(options.seed)
        return {layer.name: generator.random(layer.heads, np.float32) for layer in layers}
    if options.criterion == "magnitude":
        return {layer.name: magnitudes(denoiser, layer) for layer in layers}
    if options.criterion == "second_order":
        return {layer.name: _second_order(denoiser, context, layer) for layer in layers}
    measured = context.measured.heads(options.criterion)
    return {layer.name: measured[layer.name] for layer in layers}


def magnitudes(denoiser: Denoiser, layer: AttentionLayer) -> Floats:
    """Root mean square of each head's weights in all projections, float32 [heads]."""
    every, total = range(layer.heads), np.zeros(layer.heads)
    for place in layer.rows:
        weight = denoiser.weight(f"{place.linear}.weight")[place.places(every)]
        total += (weight.reshape(layer.heads, -1) ** 2).mean(1)
    for place in layer.columns:
        weight = denoiser.weight(f"{place.linear}.weight").T[place.places(every)]
        total += (weight.reshape(layer.heads, -1) ** 2).mean(1)
    result: Floats = np.sqrt(total / len((*layer.rows, *layer.columns))).astype(np.float32)
    return result


def _second_order(denoiser: Denoiser, context: Context, layer: AttentionLayer) -> Floats:
    """Of all streams together, each by the mean over its own tokens."""
    outputs = [
        (
            denoiser.weight(f"{place.linear}.weight")[:, place.places(range(layer.heads))],
            moment_of(context.measured, layer, place),
            place.size,
        )
        for place in layer.columns
    ]
    return removal_costs(outputs, layer.name)


def _report(layers: Layers, kept: dict[str, tuple[int, ...]], options: PruneHeads) -> dict[str, Any]:
    every = {layer.name: kept.get(layer.name, tuple(range(layer.heads))) for layer in layers.attention}
    total, stay = sum(layer.heads for layer in layers.attention), sum(map(len, every.values()))
    return {
        "options": options.model_dump(mode="json"), "retention": stay / total if total else 1.0,
        "layers": {layer.name: {"heads": layer.heads, "kept": list(every[layer.name])} for layer in layers.attention},
        "left_alone": dict(layers.unknown_attention),
    }  # fmt: skip
