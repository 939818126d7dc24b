"""What passes have changed of a denoiser: tensors in place of the checkpoint's. Their shapes give the structure.

Nothing else records the structure, so a module, a graph and a file of tensors cannot disagree about it: fewer rows of
to_q are fewer heads, and a layer with two matrices in place of its one is factorised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slipcast.bundle.tensorfile import read_header
from slipcast.errors import NumericalError
from slipcast_compiler.model.checkpoint import Checkpoint, Weight, empty_module, find_weight
from slipcast_compiler.model.layers import attention_layers, is_pointwise

Floats = npt.NDArray[np.float32]
TENSORS = "tensors.safetensors"


@dataclass(frozen=True)
class Rewrite:
    """The tensors that passes wrote, in `file`; None where there are none."""

    file: Path | None = None

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


class Denoiser:
    """The denoiser as earlier passes left it: its structure on the meta device, and its weights, read one at a time."""

    def __init__(self, checkpoint: Checkpoint, rewrite: Rewrite) -> None:
        self.checkpoint, self.rewrite = checkpoint, rewrite
        self._source = checkpoint.architecture.components["denoiser"]
        self._original, self._changed = checkpoint.weights(self._source.folder), rewrite.weights()
        self.module = empty_module(checkpoint, self._source.folder)
        fit(self.module, rewrite.shapes())
        self.module.to("meta")

    def weight(self, name: str) -> Floats:
        """A parameter in float32, by the module's name for it."""
        found = self._changed.get(name) or find_weight(name, self._original)
        assert found is not None, name
        shape = self.module.get_parameter(name).shape
        return found.read().reshape(tuple(shape)).astype(np.float32)

    def has(self, name: str) -> bool:
        """Whether the module has this parameter (a bias may be absent)."""
        return any(name == known for known, _ in self.module.named_parameters())

    def load(self, pipe: Any) -> nn.Module:
        """Make the denoiser of diffusers' pipeline this one; returns it."""
        module: nn.Module = getattr(pipe, self._source.folder)
        load(module, self._changed)
        return module


def fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give layers the sizes of the tensors that they are to hold, on the meta device where they change."""
    heads_before = {layer.name: layer.head_dim for layer in attention_layers(module)}
    for name, layer in list(module.named_modules()):
        linear = isinstance(layer, nn.Linear)
        if not (linear or is_pointwise(layer)):
            continue
        bias = layer.bias is not None
        if f"{name}.1.weight" in shapes:
            first, second = shapes[f"{name}.0.weight"], shapes[f"{name}.1.weight"]
            factors = (_layer(linear, first, bias=False), _layer(linear, second, bias))
            _replace(module, name, nn.Sequential(*factors))
        elif (shape := shapes.get(f"{name}.weight")) is not None and shape != tuple(layer.weight.shape):
            _replace(module, name, _layer(linear, shape, bias))
    for name, head_dim in heads_before.items():
        attention: Any = module.get_submodule(name)
        rows = shapes.get(f"{name}.to_q.1.weight") or shapes.get(f"{name}.to_q.weight")
        if rows is not None:
            attention.heads = rows[0] // head_dim
            attention.inner_dim = attention.inner_kv_dim = rows[0]


def load(module: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Fit a module that holds the checkpoint's weights to the changed ones, and give it those."""
    before = module.state_dict()
    fit(module, {name: tuple(weight.entry.shape) for name, weight in weights.items()})
    like = next(p for p in module.parameters() if p.device.type != "meta")
    # The bias of a layer that was made anew is in no file of changes where only its matrix changed.
    state = {name: before[name] for name, p in module.named_parameters() if p.device.type == "meta" and name in before}
    state |= {name: torch.from_numpy(weight.read()).to(like) for name, weight in weights.items()}
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


def _layer(linear: bool, shape: tuple[int, ...], bias: bool) -> nn.Module:
    with torch.device("meta"):
        if linear:
            return nn.Linear(shape[1], shape[0], bias=bias)
        return nn.Conv2d(shape[1], shape[0], 1, bias=bias)


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)
