"""Remove neurons of feed-forward layers. The two halves of a gated one (GEGLU) lose the same neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slipcast_compiler.passes.context import Context, Floats, Result
from slipcast_compiler.passes.units import corrected, damped, select
from slipcast_compiler.recipe.passes import PruneFFN

if TYPE_CHECKING:
    from slipcast_compiler.model.layers import FeedForwardLayer
    from slipcast_compiler.model.rewrite import Denoiser


def run(denoiser: Denoiser, context: Context, options: PruneFFN) -> Result:
    """See the module's docstring."""
    from slipcast_compiler.model.layers import feed_forward_layers

    layers = feed_forward_layers(denoiser.module)
    report = {"options": options.model_dump(mode="json")}
    if options.ratio == 0 or not layers:
        counts = {layer.name: {"neurons": layer.neurons, "kept": layer.neurons} for layer in layers}
        return Result(report={**report, "retention": 1.0, "layers": counts})
    found = {layer.name: _scores(denoiser, context, options, layer) for layer in layers}
    kept = select(found, options.ratio, options.floor, options.protect, "prune_ffn")
    tensors: dict[str, Floats] = {}
    counts = {}
    for layer in layers:
        stay = _rounded(found[layer.name], len(kept[layer.name]), options.multiple)
        counts[layer.name] = {"neurons": layer.neurons, "kept": len(stay)}
        if len(stay) < layer.neurons:
            moment = context.measured.second_moment(layer.down) if options.correct else None
            tensors |= keep_neurons(denoiser, layer, stay, moment)
    total = sum(layer.neurons for layer in layers)
    return Result(tensors, {**report, "retention": sum(c["kept"] for c in counts.values()) / total, "layers": counts})


def keep_neurons(
    denoiser: Denoiser, layer: FeedForwardLayer, kept: tuple[int, ...], moment: Floats | None
) -> dict[str, Floats]:
    """The layer's parameters with these neurons alone; corrected where the second moment of down's input is given."""
    chosen = np.asarray(kept, np.intp)
    rows = np.concatenate([chosen, chosen + layer.neurons]) if layer.gated else chosen
    tensors = {
        f"{layer.up}.{kind}": denoiser.weight(f"{layer.up}.{kind}")[rows]
        for kind in ("weight", "bias") if denoiser.has(f"{layer.up}.{kind}")
    }  # fmt: skip
    weight = denoiser.weight(f"{layer.down}.weight")
    narrowed = weight[:, chosen] if moment is None else corrected(weight, moment, chosen, layer.name)
    return {**tensors, f"{layer.down}.weight": narrowed}


def _scores(denoiser: Denoiser, context: Context, options: PruneFFN, layer: FeedForwardLayer) -> Floats:
    """Importance of each neuron, float32 [neurons]."""
    if options.criterion == "random":
        digest = np.frombuffer(layer.name.encode(), np.uint8)
        return np.random.default_rng([options.seed, *digest]).random(layer.neurons, np.float32)
    weight = denoiser.weight(f"{layer.down}.weight")
    if options.criterion == "magnitude":
        up = denoiser.weight(f"{layer.up}.weight").reshape(-1, layer.neurons, weight.shape[0])
        norms: Floats = np.sqrt((weight**2).mean(0) + (up**2).mean((0, 2))).astype(np.float32)
        return norms
    if options.criterion == "second_order":
        # One neuron's cost with the rest corrected, w^2 / [H^-1]_ii; of all at once, as one by one would take hours.
        h = damped(context.measured.second_moment(layer.down))
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
