"""A pipeline whose weights stay on the disk: its modules have shapes, and numbers are read when they are written.

So the export of a pipeline takes memory for the graph and the largest tensor, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from slipcast.errors import ArtifactError
from slipcast_compiler.capture.open import LARGE, open_parts
from slipcast_compiler.capture.shapes import zeros
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.model.rewrite import NO_REWRITES, Rewrites, fit
from slipcast_compiler.model.unread import Unread, load_unread, open_unread

Weights = Mapping[str, Unread | None]
NOTHING: Weights = MappingProxyType({})


@dataclass(frozen=True)
class Streamed:
    """`pipe`: in fp32, for inference; its weights are zeros that take no memory. `weights`: by component and name, what
    they are; None where the checkpoint has no tensor for a parameter."""

    pipe: Any
    weights: Weights


def open_streamed(root: Path, pipeline: str | None = None, rewrites: Rewrites = NO_REWRITES) -> Streamed:
    """The same pipeline as open_without_weights, with every buffer as its constructor, or the checkpoint, has it, and
    with modules as passes left them.

    ArtifactError where the weights do not go with a component's config.
    """
    weights: dict[str, Unread | None] = {}

    def load(kind: Any, folder: Path) -> nn.Module:
        module, missing = load_unread(kind, folder)
        weights.update({f"{folder.name}.{name}": each for name, each in _hollow(module).items()})
        weights.update({f"{folder.name}.{name}": None for name in missing})
        return module

    pipe = open_parts(root, pipeline, load)
    for name, rewrite in rewrites.items():
        fit(module_of(pipe, name), rewrite.shapes())
        _fill(module_of(pipe, name))
        weights.update({f"{name}.{path}": each for path, each in open_unread(rewrite.files).items()})
    return Streamed(pipe, weights)


def _hollow(module: nn.Module) -> dict[str, Unread]:
    """By every name that they have, the weights that are not read, with zeros in their places. Small buffers are read:
    code may branch on their numbers."""
    found: dict[str, Unread] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        for name, tensor in (*each._parameters.items(), *each._buffers.items()):
            if isinstance(tensor, Unread) and not _is_read(tensor):
                found[f"{path}.{name}".lstrip(".")] = tensor
    _fill(module)
    return found


def _fill(module: nn.Module) -> None:
    """Put zeros, or what is read at once, in the places of what is not there."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # tied weights stay one
    for each in module.modules():
        for own in (each._parameters, each._buffers):
            for name, tensor in own.items():
                if isinstance(tensor, Unread) or (tensor is not None and tensor.is_meta):
                    own[name] = made.setdefault(tensor, _in_place_of(tensor))


def _is_read(tensor: torch.Tensor) -> bool:
    small = tensor.numel() <= LARGE or not tensor.is_floating_point()
    return small and not isinstance(tensor, nn.Parameter)


def _in_place_of(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Unread) and _is_read(tensor):
        return tensor.read()
    made = zeros(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def attach(graph: ir.Graph, own: Mapping[str, torch.Tensor], weights: Weights) -> None:
    """Have the weights of a traced graph read when they are written, one at a time: those of its module's `own`, or
    `weights` in their place, by the same names. What no node uses is dropped.

    ArtifactError where there is none.
    """
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
        elif name in own:  # others are constants, with their numbers
            tensor = weights.get(name, own[name].detach())
            if tensor is None:
                raise ArtifactError(
                    f"the checkpoint has no tensor for {name.removeprefix('components.')}",
                    expected="weights that go with the component's config.json",
                    hint="download the checkpoint again, or save the pipeline again with the library's present version",
                )
            shape = ir.Shape(tuple(tensor.shape))
            value.const_value = ir.LazyTensor(_reader(tensor, name), value.const_value.dtype, shape, name=name)


def _reader(tensor: torch.Tensor, name: str) -> Callable[[], ir.Tensor]:
    def read() -> ir.Tensor:
        numbers = tensor.read() if isinstance(tensor, Unread) else tensor
        return ir.Tensor(np.ascontiguousarray(numbers.numpy()), name=name)

    return read
