"""Random numbers in place of weights that do not fit into memory, for a pipeline that is compared with its own program.

A component's weights that sum over the same number of inputs are the beginnings of one vector, so that all of its
layers take the memory of a few. What is compared is the code between the components, which does not know of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slipcast_compiler.export.streamed import open_streamed
from slipcast_compiler.model.rewrite import NO_REWRITES, Rewrites


def open_at_random(root: Path, pipeline: str | None = None, rewrites: Rewrites = NO_REWRITES) -> Any:
    """The pipeline of open_with_weights, with other weights: the same each time, of the shapes that passes left.
    Buffers are the checkpoint's."""
    streamed, generator = open_streamed(root, pipeline, rewrites), torch.Generator("cpu").manual_seed(0)
    for name, component in streamed.pipe.components.items():
        if isinstance(component, nn.Module):
            _fill_parameters(component, generator)
            for path, buffer in component.named_buffers():
                if (unread := streamed.weights.get(f"{name}.{path}")) is not None:
                    buffer.copy_(unread.read())
    return streamed.pipe


def _fill_parameters(component: nn.Module, generator: torch.Generator) -> None:
    sizes: dict[int, int] = {}
    for weight in component.parameters():
        if weight.ndim > 1:
            sizes[_inputs(weight)] = max(sizes.get(_inputs(weight), 0), weight.numel())
    vectors = {
        inputs: torch.randn(size, generator=generator).mul_(inputs**-0.5) for inputs, size in sorted(sizes.items())
    }
    for path, weight in component.named_parameters():
        if weight.ndim > 1:
            weight.data = vectors[_inputs(weight)][: weight.numel()].view(weight.shape)
        else:  # scales are near one, biases near zero, as they are when training begins
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = noise.mul_(0.1).add_(float(path.endswith("weight")))


def _inputs(weight: torch.Tensor) -> int:
    """How many inputs an output of a matrix, or of a convolution, sums over."""
    return max(int(weight.numel()) // max(int(weight.shape[0]), 1), 1)
