"""What of a denoiser passes can rewrite: heads, neurons and linear layers, found by looking at the module alone.

Modules may be on the meta device. Sizes are those that the module has, so a pruned one shows what is left of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from slipcast_compiler.model.attention import find_attention
from slipcast_compiler.model.feed_forward import find_feed_forward
from slipcast_compiler.model.units import AttentionLayer, FeedForwardLayer, is_pointwise

__all__ = ["AttentionLayer", "FeedForwardLayer", "Layers", "LinearLayer", "attention_layers", "feed_forward_layers",
           "layers_of", "linear_layers"]  # fmt: skip


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer, or a convolution with a 1x1 kernel, which is one of every pixel."""

    name: str
    inputs: int
    outputs: int
    convolution: bool


@dataclass(frozen=True)
class Layers:
    """What passes know of a module, and, by name, why attention and feed-forward modules are left alone."""

    attention: tuple[AttentionLayer, ...]
    feed_forward: tuple[FeedForwardLayer, ...]
    linear: tuple[LinearLayer, ...]
    unknown_attention: Mapping[str, str]
    unknown_feed_forward: Mapping[str, str]

    def leave(self, attention: Mapping[str, str], feed_forward: Mapping[str, str]) -> Layers:
        """The same, but for layers that are left alone besides, by name, and why."""
        return dataclasses.replace(
            self,
            attention=tuple(layer for layer in self.attention if layer.name not in attention),
            feed_forward=tuple(layer for layer in self.feed_forward if layer.name not in feed_forward),
            unknown_attention={**self.unknown_attention, **attention},
            unknown_feed_forward={**self.unknown_feed_forward, **feed_forward},
        )


def layers_of(module: nn.Module) -> Layers:
    """All that passes can rewrite in a module, whatever calls it, in the module's order."""
    attention = find_attention(module)
    apart = find_feed_forward(module, (*attention.layers, *attention.unknown))
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    feed_forward = {**attention.beside, **apart.layers}
    return Layers(
        tuple(attention.layers.values()),
        tuple(feed_forward[name] for name in sorted(feed_forward, key=order.__getitem__)),
        linear_layers(module),
        attention.unknown,
        apart.unknown,
    )


def attention_layers(module: nn.Module) -> tuple[AttentionLayer, ...]:
    """The attention modules whose heads can be removed one by one."""
    return tuple(find_attention(module).layers.values())


def feed_forward_layers(module: nn.Module) -> tuple[FeedForwardLayer, ...]:
    """The perceptrons whose neurons can be removed one by one."""
    return layers_of(module).feed_forward


def linear_layers(module: nn.Module) -> tuple[LinearLayer, ...]:
    """All linear layers and 1x1 convolutions, in the module's order."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            found.append(LinearLayer(name, layer.in_features, layer.out_features, convolution=False))
        elif is_pointwise(layer):
            found.append(LinearLayer(name, layer.in_channels, layer.out_channels, convolution=True))
    return tuple(found)
