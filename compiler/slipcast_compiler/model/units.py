"""Units: what can be taken out of a denoiser, attention heads and feed-forward neurons, and where their weights lie.

A unit has rows of the linear layers before it and columns of those after it. Removing it from all of them is, exactly,
multiplying its columns' inputs by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


@dataclass(frozen=True)
class Slice:
    """Unit i has rows, or columns, `start` + i * `size` to `start` + (i + 1) * `size` of the layer `linear`."""

    linear: str
    size: int
    start: int = 0

    def places(self, units: Sequence[int]) -> npt.NDArray[np.intp]:
        """The rows, or columns, of these units."""
        return self.start + (np.asarray(units, np.intp)[:, None] * self.size + np.arange(self.size)).reshape(-1)


@dataclass(frozen=True)
class AttentionLayer:
    """`heads` of an attention module, which can be removed one by one.

    `rows`: of the projections, those of the text's stream and of gates included, and `values` those of values alone;
    `columns`: of the output projections, one for each stream. Where `group` query heads share a key head, it and they
    are one head here.
    """

    name: str
    heads: int
    head_dim: int
    rows: tuple[Slice, ...]
    values: tuple[Slice, ...]
    columns: tuple[Slice, ...]
    group: int = 1
    cross: bool = False  # keys and values are the text's alone

    @property
    def units(self) -> int:
        """The number of heads."""
        return self.heads


@dataclass(frozen=True)
class FeedForwardLayer:
    """`neurons` of a two-layer perceptron: rows of what leads to them (a gate's too), and columns of what follows.

    `between`: rows of convolutions of every neuron by itself, which are among `rows` too.
    """

    name: str
    neurons: int
    rows: tuple[Slice, ...]
    columns: tuple[Slice, ...]
    between: tuple[Slice, ...] = ()

    @property
    def units(self) -> int:
        """The number of neurons."""
        return self.neurons

    @property
    def gated(self) -> bool:
        """Whether each neuron is multiplied by another (GEGLU, SwiGLU)."""
        return len(self.inputs) > 1

    @property
    def inputs(self) -> tuple[Slice, ...]:
        """The rows that read what the perceptron is given."""
        return tuple(place for place in self.rows if place not in self.between)


class Factors(nn.Sequential):  # type: ignore[misc]
    """Two linear layers in place of one."""

    @property
    def weight(self) -> torch.Tensor:
        """The second one's: some models ask a layer for its weight's type before they call it."""
        weight: torch.Tensor = self[1].weight
        return weight


def matrix_size(layer: Any) -> tuple[int, int] | None:
    """(rows, columns) of a linear layer, of a 1x1 convolution, or of one that has factors in its place; else None."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if is_pointwise(layer):
        return layer.out_channels, layer.in_channels
    if isinstance(layer, Factors):
        first, second = (matrix_size(each) for each in layer)
        return (second[0], first[1]) if first and second else None
    return None


def is_pointwise(layer: object) -> bool:
    """Whether it is a 1x1 convolution."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1


def is_depthwise(layer: object) -> bool:
    """Whether it is a convolution of every channel by itself."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def count_parameters(module: nn.Module) -> int:
    """Of a module, on whatever device."""
    return sum(parameter.numel() for parameter in module.parameters())


def matrices(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(rows, columns) of all that `matrix_size` knows in a module, by name, in its order; factors are not listed."""
    found: dict[str, tuple[int, int]] = {}
    for name, layer in module.named_modules():
        if (size := matrix_size(layer)) and name.rpartition(".")[0] not in found:
            found[name] = size
    return found


def empty_layer(like: Any, shape: tuple[int, ...], bias: bool) -> nn.Module:
    """A layer of the kind of `like` for a weight of this shape, on the meta device.

    `like`: a linear layer, a 1x1 convolution or one of every channel by itself.
    """
    rows, columns = shape[:2]
    with torch.device("meta"):
        if is_depthwise(like):
            kernel = like.kernel_size, like.stride, like.padding, like.dilation
            return nn.Conv2d(rows, rows, *kernel, groups=rows, bias=bias, padding_mode=like.padding_mode)
        if isinstance(like, nn.Conv2d):
            return nn.Conv2d(columns, rows, 1, bias=bias)
        return nn.Linear(columns, rows, bias=bias)


def replace_layer(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)
