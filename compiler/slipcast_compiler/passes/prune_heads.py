"""Remove attention heads: smaller to_q, to_k, to_v and to_out, with a count of its own in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slipcast_compiler.passes.context import Context, Floats, Result
from slipcast_compiler.passes.units import columns, corrected, removal_costs, select
from slipcast_compiler.recipe.passes import PruneHeads

if TYPE_CHECKING:
    from slipcast_compiler.model.layers import AttentionLayer
    from slipcast_compiler.model.rewrite import Denoiser


def run(denoiser: Denoiser, context: Context, options: PruneHeads) -> Result:
    """See the module's docstring."""
    from slipcast_compiler.model.layers import attention_layers

    layers = attention_layers(denoiser.module)
    if options.ratio == 0:
        return Result(report=_report(layers, {}, options))
    kept = select(scores(denoiser, context, options), options.ratio, options.floor, options.protect, "prune_heads")
    tensors: dict[str, Floats] = {}
    for layer in layers:
        if len(kept[layer.name]) < layer.heads:
            moment = context.measured.second_moment(layer.output) if options.correct else None
            tensors |= keep_heads(denoiser, layer, kept[layer.name], moment)
    return Result(tensors, _report(layers, kept, options))


def scores(denoiser: Denoiser, context: Context, options: PruneHeads) -> dict[str, Floats]:
    """Importance by layer, float32 [heads]: the larger, the more is lost without the head."""
    from slipcast_compiler.model.layers import attention_layers

    layers = attention_layers(denoiser.module)
    if options.criterion == "random":
        generator = np.random.default_rng(options.seed)
        return {layer.name: generator.random(layer.heads, np.float32) for layer in layers}
    if options.criterion == "magnitude":
        return {layer.name: magnitudes(denoiser, layer) for layer in layers}
    if options.criterion == "second_order":
        return {
            layer.name: removal_costs(
                denoiser.weight(f"{layer.output}.weight"), context.measured.second_moment(layer.output),
                layer.head_dim, layer.name,
            )
            for layer in layers
        }  # fmt: skip
    measured = context.measured.heads(options.criterion)
    return {layer.name: measured[layer.name] for layer in layers}


def magnitudes(denoiser: Denoiser, layer: AttentionLayer) -> Floats:
    """Root mean square of each head's weights in all four projections, float32 [heads]."""
    total = np.zeros(layer.heads)
    for name in layer.projections:
        weight = denoiser.weight(f"{name}.weight")
        total += (weight.reshape(layer.heads, -1) ** 2).mean(1)
    output = denoiser.weight(f"{layer.output}.weight").T
    total += (output.reshape(layer.heads, -1) ** 2).mean(1)
    result: Floats = np.sqrt(total / 4).astype(np.float32)
    return result


def keep_heads(
    denoiser: Denoiser, layer: AttentionLayer, kept: tuple[int, ...], moment: Floats | None
) -> dict[str, Floats]:
    """The layer's parameters with these heads alone; corrected where the second moment of to_out's input is given."""
    chosen = columns(kept, layer.head_dim)
    tensors = {}
    for name in layer.projections:
        for kind in ("weight", "bias"):
            if denoiser.has(f"{name}.{kind}"):
                tensors[f"{name}.{kind}"] = denoiser.weight(f"{name}.{kind}")[chosen]
    weight = denoiser.weight(f"{layer.output}.weight")
    narrowed = weight[:, chosen] if moment is None else corrected(weight, moment, chosen, layer.name)
    return {**tensors, f"{layer.output}.weight": narrowed}


def _report(
    layers: tuple[AttentionLayer, ...], kept: dict[str, tuple[int, ...]], options: PruneHeads
) -> dict[str, Any]:
    every = {layer.name: kept.get(layer.name, tuple(range(layer.heads))) for layer in layers}
    total, stay = sum(layer.heads for layer in layers), sum(map(len, every.values()))
    return {
        "options": options.model_dump(mode="json"), "retention": stay / total if total else 1.0,
        "layers": {layer.name: {"heads": layer.heads, "kept": list(every[layer.name])} for layer in layers},
    }  # fmt: skip
