"""What of a denoiser can be rewritten: attention layers, feed-forward layers, and linear layers, by module name.

Modules may be on the meta device. Sizes are those that the module has, so a pruned one shows what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class AttentionLayer:
    """Head i has rows i * head_dim to (i + 1) * head_dim of to_q, to_k and to_v, and these columns of to_out.0."""

    name: str
    heads: int
    head_dim: int
    cross: bool  # to_k and to_v read the text

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers whose rows belong to heads."""
        return tuple(f"{self.name}.{part}" for part in ("to_q", "to_k", "to_v"))

    @property
    def output(self) -> str:
        """The linear layer whose columns belong to heads."""
        return f"{self.name}.to_out.0"


@dataclass(frozen=True)
class FeedForwardLayer:
    """Neuron i has row i of `up` (and row neurons + i, its gate's, where gated), and column i of `down`."""

    name: str
    neurons: int
    gated: bool  # GEGLU and its like: up's first half is multiplied by the activation of its second half

    @property
    def up(self) -> str:
        """The linear layer whose rows belong to neurons."""
        return f"{self.name}.net.0.proj"

    @property
    def down(self) -> str:
        """The linear layer whose columns belong to neurons."""
        return f"{self.name}.net.2"


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer, or a convolution with a 1x1 kernel, which is one of every pixel."""

    name: str
    inputs: int
    outputs: int
    convolution: bool


def attention_layers(module: nn.Module) -> tuple[AttentionLayer, ...]:
    """Attention with separate projections, in the module's order. Joint attention (SD3, FLUX) is left alone."""
    found = []
    for name, layer in module.named_modules():
        if not all(hasattr(layer, part) for part in ("to_q", "to_k", "to_v", "to_out", "heads")):
            continue
        if getattr(layer, "add_k_proj", None) is not None:
            continue
        rows = _rows(layer.to_q)
        cross = bool(getattr(layer, "is_cross_attention", False))
        found.append(AttentionLayer(name, int(layer.heads), rows // int(layer.heads), cross))
    return tuple(found)


def feed_forward_layers(module: nn.Module) -> tuple[FeedForwardLayer, ...]:
    """The two-layer perceptrons of transformer blocks, in the module's order."""
    from diffusers.models.attention import FeedForward

    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, FeedForward):
            neurons = _columns(layer.net[2])
            found.append(FeedForwardLayer(name, neurons, gated=_rows(layer.net[0].proj) == 2 * neurons))
    return tuple(found)


def linear_layers(module: nn.Module) -> tuple[LinearLayer, ...]:
    """All linear layers and 1x1 convolutions, in the module's order."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            found.append(LinearLayer(name, layer.in_features, layer.out_features, convolution=False))
        elif is_pointwise(layer):
            found.append(LinearLayer(name, layer.in_channels, layer.out_channels, convolution=True))
    return tuple(found)


def is_pointwise(layer: Any) -> bool:
    """Whether it is a 1x1 convolution."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1


def _rows(layer: nn.Module) -> int:
    return int(_weights(layer)[-1].shape[0])


def _columns(layer: nn.Module) -> int:
    return int(_weights(layer)[0].shape[1])


def _weights(layer: nn.Module) -> list[torch.Tensor]:
    """The matrix of a linear layer, or those of its factors in the order of use."""
    return [parameter for name, parameter in layer.named_parameters() if name.endswith("weight")]
