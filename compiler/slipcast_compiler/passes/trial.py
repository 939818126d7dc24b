"""Whether what the structure of a module says holds when it is called: a unit that is removed is a unit that is masked.

What calls the module, and code within it that shapes do not show, may want all heads there. One call of the module
with a unit less in every layer tells; where it does not hold, halving finds the layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from slipcast_compiler.model.layers import AttentionLayer, FeedForwardLayer, Layers, layers_of
from slipcast_compiler.model.rewrite import fit, load_tensors
from slipcast_compiler.passes.units import Floats, keep_units
from slipcast_compiler.profile.importance import masked

Layer = AttentionLayer | FeedForwardLayer
Evaluate = Callable[[nn.Module], torch.Tensor]
TOLERANCE = 1e-4  # of the output, as a relative L2 norm: sums of other lengths are rounded otherwise


def tried_layers(module: nn.Module, evaluate: Evaluate) -> Layers:
    """layers_of(module), without those of which no unit can be removed in `evaluate`, which calls a module like it.

    On the meta device it is tried that it runs; with weights (any will do) that the result is that of the mask.
    """
    found = layers_of(module)
    with torch.no_grad():
        evaluate(module)  # what fails as it is, is not for want of a unit
    return found.leave(_wrong(module, found.attention, evaluate), _wrong(module, found.feed_forward, evaluate))


def _wrong(module: nn.Module, layers: Sequence[Layer], evaluate: Evaluate) -> dict[str, str]:
    """By name of the layer, why."""
    layers = [layer for layer in layers if layer.units > 1]
    why = _why_not(module, layers, evaluate) if layers else None
    if why is None:
        return {}
    if len(layers) == 1:
        return {layers[0].name: why}
    half = len(layers) // 2
    return _wrong(module, layers[:half], evaluate) | _wrong(module, layers[half:], evaluate)


def _why_not(module: nn.Module, layers: Sequence[Layer], evaluate: Evaluate) -> str | None:
    """What is wrong without one unit of each of these layers."""
    weights, tensors = _OwnWeights(module), dict[str, Floats]()
    for layer in layers:
        kept = [unit for unit in range(layer.units) if unit != layer.units // 2]
        tensors |= keep_units(weights, layer, kept, None)
    smaller = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    with torch.no_grad():
        try:
            if weights.meta:
                fit(smaller, {name: array.shape for name, array in tensors.items()})
                evaluate(smaller)
                return None
            load_tensors(smaller, tensors)
            found = evaluate(smaller)
        except Exception as error:  # whatever code raises that was not made for fewer
            return f"without one of its units it does not run ({' '.join(str(error).split())[:80]})"
        with masked(module, {layer: _mask(layer) for layer in layers}):
            wanted = evaluate(module)
    off = float((found - wanted).norm() / wanted.norm())
    return None if off <= TOLERANCE else f"removing a unit is not masking it: a relative error of {off:.2g}"


def _mask(layer: Layer) -> torch.Tensor:
    mask = torch.ones(1, layer.units)
    mask[0, layer.units // 2] = 0
    return mask


class _OwnWeights:
    """A module's own parameters, as passes read them; on the meta device shapes alone are right."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self.meta = any(parameter.is_meta for parameter in self._parameters.values())

    def weight(self, name: str) -> Floats:
        parameter = self._parameters[name]
        if self.meta:
            return np.broadcast_to(np.float32(0), tuple(parameter.shape))
        array: Floats = parameter.detach().float().cpu().numpy()
        return array

    def has(self, name: str) -> bool:
        return name in self._parameters
