"""What is measured while a denoiser samples: its layers (layers.py), the curves over the steps, and a few states.

A *sample* is one row of a batch in one evaluation of the denoiser; under guidance an image has two rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from slipcast.errors import NumericalError
from slipcast_compiler.profile.layers import LayerObserver
from slipcast_compiler.profile.streaming import Floats


@dataclass(frozen=True)
class State:
    """One point of a trajectory, as the denoiser saw it; rows: unconditional and conditional, or one."""

    image: int
    evaluation: int
    sample: torch.Tensor  # float32 [1, c, h, w], scaled
    timestep: float
    conditioning: dict[str, torch.Tensor]  # what else the denoiser is given, by name: [rows, ...]


class Observer:
    """Measures a denoiser (`module`, in place) for as long as `watching()` is entered.

    `wanted` are the (image, evaluation) whose states are kept; `advance` is told the images of each evaluation.
    """

    def __init__(
        self, module: nn.Module, evaluations: int, guided: bool, wanted: Sequence[tuple[int, int]],
        advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._module, self._guided, self._wanted, self._advance = module, guided, set(wanted), advance
        self.layers = LayerObserver(module)
        self.states: list[State] = []
        self._change = {name: np.zeros(evaluations - 1) for name, _ in blocks(module)}
        self._gap = np.zeros(evaluations)
        self._timesteps = np.zeros(evaluations, np.float32)
        self._before: dict[str, torch.Tensor] = {}
        self._first, self._evaluation, self._images = 0, 0, 0

    def begin(self, first: int, count: int) -> None:
        """The next batch: images `first` to `first` + `count` - 1."""
        self._first, self._evaluation, self._images = first, 0, count
        self._before.clear()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, every evaluation is measured."""
        with self.layers.watching(), contextlib.ExitStack() as hooks:
            for name, block in blocks(self._module):
                hooks.callback(block.register_forward_hook(self._block_hook(name)).remove)
            hooks.callback(self._module.register_forward_hook(self._evaluated, with_kwargs=True).remove)
            yield

    def results(self) -> dict[str, Floats]:
        """Tensors of the profile by name, all but those of taylor, leave_one_out and magnitude."""
        images = self._first + self._images
        found = self.layers.results()
        rows = images * (2 if self._guided else 1)
        for name, total in self._change.items():
            found[f"steps.feature_change/{name}"] = (total / rows).astype(np.float32)
        found["steps/guidance_gap"] = (self._gap / images if self._guided else self._gap[:0]).astype(np.float32)
        found["steps/timesteps"] = self._timesteps
        return found

    def _block_hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            now = main_tensor(output)
            if name in self._before:
                self._change[name][self._evaluation - 1] += float(relative(now, self._before[name]).sum())
            self._before[name] = now

        return hook

    def _evaluated(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        prediction, (batch, timestep) = output[0], args[:2]
        if not torch.isfinite(prediction).all():
            raise NumericalError(
                f"{first_bad(module, args, kwargs) or 'the denoiser'}: NaN or infinity in its output",
                expected="finite numbers",
                got=f"at timestep {float(timestep):g} of the calibration images from {self._first} on",
                hint="the checkpoint's weights or its scheduler are not what the model was trained with",
            )
        if self._guided:
            unconditional, conditional = prediction.chunk(2)
            self._gap[self._evaluation] += float(relative(unconditional, conditional).sum())
        self._timesteps[self._evaluation] = float(timestep)
        self._keep(batch, float(timestep), kwargs)
        self._evaluation += 1
        self._advance(self._images)

    def _keep(self, batch: torch.Tensor, timestep: float, kwargs: Mapping[str, Any]) -> None:
        for i in range(self._images):
            if (self._first + i, self._evaluation) in self._wanted:
                rows = [i, i + self._images] if self._guided else [i]
                conditioning = {name: x[rows].clone() for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
                state = State(self._first + i, self._evaluation, batch[i : i + 1].clone(), timestep, conditioning)
                self.states.append(state)


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Down, middle and up blocks of a U-Net, or the blocks of a transformer, in the module's order."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found += [(f"{name}.{i}", block) for i, block in enumerate(child)]
        elif name == "mid_block":
            found.append((name, child))
    return found


def main_tensor(output: Any) -> torch.Tensor:
    """What a block returns, or the largest of what it returns: the picture's stream rather than the text's."""
    if isinstance(output, torch.Tensor):
        return output
    return max((each for each in output if isinstance(each, torch.Tensor)), key=torch.Tensor.numel)


def relative(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|x - reference| / |reference| of each row: [n]. Of a reference that is zero: 0 where x is as well."""
    size = reference.flatten(1).norm(dim=1)
    return (x - reference).flatten(1).norm(dim=1) / size.clamp_min(torch.finfo(size.dtype).tiny)


def first_bad(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> str | None:
    """The layer whose output is the first to hold NaN or infinity when `module` is run so; None where none does."""
    bad: list[str] = []

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
                bad.append(name)

        return hook

    leaves = [(name, layer) for name, layer in module.named_modules() if not next(layer.children(), None)]
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in leaves]
    try:
        module.forward(*args, **kwargs)  # and not by a call, which would come back to whoever watches
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None
