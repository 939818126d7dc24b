"""What passes have changed of a denoiser: tensors in place of the checkpoint's. Their shapes give the structure.

Nothing else records the structure, so a module, a graph and a file of tensors cannot disagree about it: fewer rows of
to_q are fewer heads, and a layer with two matrices in place of its one is factorised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slipcast.bundle.tensorfile import read_header
from slipcast.errors import NumericalError
from slipcast_compiler.model.attention import set_heads
from slipcast_compiler.model.checkpoint import Checkpoint, Weight, empty_module, find_weight
from slipcast_compiler.model.feed_forward import set_neurons
from slipcast_compiler.model.layers import Layers, layers_of
from slipcast_compiler.model.units import (
    AttentionLayer,
    Factors,
    FeedForwardLayer,
    empty_layer,
    is_depthwise,
    is_pointwise,
    matrix_size,
    replace_layer,
)

Floats = npt.NDArray[np.float32]
TENSORS = "tensors.safetensors"


@dataclass(frozen=True)
class Rewrite:
    """The tensors that passes wrote, in `file`; None where there are none."""

    file: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, if there is one."""
        return (self.file,) if self.file else ()

    @property
    def digest(self) -> str | None:
        """SHA-256 of the tensors."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest() if self.file else None

    def weights(self) -> dict[str, Weight]:
        """The changed tensors by parameter name, not yet read."""
        return {name: Weight(self.file, entry) for name, entry in read_header(self.file).items()} if self.file else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the changed tensors."""
        return {name: tuple(weight.entry.shape) for name, weight in self.weights().items()}


UNCHANGED = Rewrite()
Rewrites = Mapping[str, Rewrite]  # by module of a pipeline, as calls name it
NO_REWRITES: Rewrites = MappingProxyType({})


def digests_of(rewrites: Rewrites) -> dict[str, str | None]:
    """By module, SHA-256 of the tensors that were changed."""
    return {name: rewrite.digest for name, rewrite in sorted(rewrites.items())}


class Stored(Protocol):
    """A tensor on the disk."""

    def read(self) -> npt.NDArray[Any]:
        """Its numbers."""


class Denoiser:
    """A denoiser as earlier passes left it: its structure on the meta device, and its weights, read one at a time.

    `module` has the original's structure (it is changed); `weights`: the original's parameters by name, or by a name
    that older checkpoints have for them; `known`: what passes may rewrite of the original, where that is less than its
    structure says (see passes/trial.py).
    """

    def __init__(
        self, module: nn.Module, weights: Mapping[str, Stored], rewrite: Rewrite, known: Layers | None = None
    ) -> None:
        self._original, self._changed, self._known = weights, rewrite.weights(), known
        self.module = module
        fit(self.module, rewrite.shapes())
        self.module.to("meta")

    @cached_property
    def layers(self) -> Layers:
        """What passes can rewrite, as it is now."""
        found = layers_of(self.module)
        return found.leave(self._known.unknown_attention, self._known.unknown_feed_forward) if self._known else found

    @classmethod
    def of(cls, checkpoint: Checkpoint, rewrite: Rewrite) -> Denoiser:
        """The denoiser of a checkpoint whose architecture is described."""
        folder = checkpoint.architecture.components["denoiser"].folder
        return cls(empty_module(checkpoint, folder), checkpoint.weights(folder), rewrite)

    def weight(self, name: str) -> Floats:
        """A parameter in float32, by the module's name for it."""
        found: Stored | None = self._changed.get(name) or find_weight(name, self._original)
        assert found is not None, name
        shape = self.module.get_parameter(name).shape
        return found.read().reshape(tuple(shape)).astype(np.float32)

    def has(self, name: str) -> bool:
        """Whether the module has this parameter (a bias may be absent)."""
        return any(name == known for known, _ in self.module.named_parameters())

    def load(self, original: nn.Module) -> nn.Module:
        """Make this one of a module that holds the original's weights; returns it."""
        load(original, self._changed)
        return original


def fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give layers the sizes of the tensors that they are to hold, on the meta device where they change."""
    if not shapes:
        return
    before = layers_of(module)
    for name, layer in list(module.named_modules()):
        if not (isinstance(layer, nn.Linear) or is_pointwise(layer) or is_depthwise(layer)):
            continue
        bias = layer.bias is not None
        if f"{name}.1.weight" in shapes:
            first, second = shapes[f"{name}.0.weight"], shapes[f"{name}.1.weight"]
            factors = (empty_layer(layer, first, bias=False), empty_layer(layer, second, bias))
            replace_layer(module, name, Factors(*factors))
        elif (shape := shapes.get(f"{name}.weight")) is not None and shape != tuple(layer.weight.shape):
            replace_layer(module, name, empty_layer(layer, shape, bias))
    for attention in before.attention:
        beside = next((each for each in before.feed_forward if _shares(each, attention)), None)
        heads, neurons = _left(module, attention, beside)
        set_heads(module.get_submodule(attention.name), attention, heads)
        if beside:
            set_neurons(module.get_submodule(beside.name), neurons)


def _shares(layer: FeedForwardLayer, attention: AttentionLayer) -> bool:
    return layer.columns[0].linear == attention.columns[0].linear


def _left(module: nn.Module, attention: AttentionLayer, beside: FeedForwardLayer | None) -> tuple[int, int]:
    """The heads that a fitted module has left, and the neurons beside them, if any."""
    linear = attention.rows[0].linear
    sizes = [matrix_size(module.get_submodule(name)) for name in (linear, attention.columns[0].linear)]
    rows, columns = (size[side] for side, size in enumerate(sizes) if size)
    per_head = sum(each.size for each in attention.rows if each.linear == linear)
    per_neuron = sum(each.linear == linear for each in beside.rows) if beside else 0
    # rows = per_head heads + per_neuron neurons, and columns = width heads + neurons
    width = attention.columns[0].size
    heads = (rows - per_neuron * columns) // (per_head - per_neuron * width)
    return heads, columns - width * heads


def load(module: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Fit a module that holds the checkpoint's weights to the changed ones, and give it those."""
    load_tensors(module, {name: weight.read() for name, weight in weights.items()})


def load_tensors(module: nn.Module, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """The same, from memory."""
    before, like = module.state_dict(), next(module.parameters())
    fit(module, {name: array.shape for name, array in tensors.items()})
    # The bias of a layer that was made anew is in no file of changes where only its matrix changed.
    state = {name: before[name] for name, p in module.named_parameters() if p.device.type == "meta" and name in before}
    state |= {name: torch.from_numpy(array).to(like) for name, array in tensors.items()}
    module.load_state_dict(state, strict=False, assign=True)
    left = [name for name, parameter in module.named_parameters() if parameter.device.type == "meta"]
    assert not left, left


def write_tensors(tensors: Mapping[str, Floats], before: Rewrite, out: Path) -> Rewrite:
    """Write changed tensors on top of those of earlier passes. NumericalError names one that is not finite."""
    from safetensors.numpy import save_file

    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise NumericalError(
                f"{name}: the rewritten weight is not finite", expected="finite numbers", got="NaN or infinity"
            )
    kept = {name: weight.read() for name, weight in before.weights().items() if not _replaced(name, tensors)}
    merged = {name: np.ascontiguousarray(array, np.float32) for name, array in {**kept, **tensors}.items()}
    save_file(dict(sorted(merged.items())), out)
    return Rewrite(out)


def _replaced(name: str, tensors: Mapping[str, Floats]) -> bool:
    """Whether a newer tensor stands in its place, or the factors of its layer do."""
    layer, _, kind = name.rpartition(".")
    return name in tensors or f"{layer}.1.{kind}" in tensors
