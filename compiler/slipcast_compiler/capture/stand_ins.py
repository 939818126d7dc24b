"""Functions in place of modules, for a program that is compared with its pipeline where the modules take too long.

What is compared is the code between the modules: they are the same in both, and whatever they compute, both have to
give them the same and to do the same with what comes back. So a function of all that they are given, with results of
their shapes, tells as much, in no time and without weights.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slipcast_compiler.capture.program import Call, Program, leaves, opened, rebuild
from slipcast_compiler.capture.replay import find_module
from slipcast_compiler.capture.shapes import ShapeRunner


@contextlib.contextmanager
def standing_in(program: Program, components: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, functions are in the places of the modules that a program calls: of those of which it holds nothing
    but the call, and of none where prompts are padded, as only the modules leave the padding out of account."""
    calls = [event for event in program.events if isinstance(event, Call)]
    held = {call.module for call in calls if call.inside or call.changed or call.written}
    padded = any(source.padding for source in program.needed_sources)
    runner, found = ShapeRunner(), list[nn.Module]()
    for name in dict.fromkeys(call.module for call in calls if not padded):
        if name not in held:
            found.append(module := find_module(components, name))
            vars(module)["forward"] = _StandIn(runner, module, name)
    try:
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)


class _StandIn:
    """Smooth in every number that it is given, so that rounding stays small: of each tensor a scalar, from its length
    and its product with a fixed vector; by those the result is a sum of fixed tensors. What has the result's shape is
    part of it too."""

    def __init__(self, runner: ShapeRunner, module: nn.Module, name: str) -> None:
        self._runner, self._module, self._name = runner, module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        del vars(self._module)["forward"]
        try:
            shaped = self._runner.run(self._module, self._name, args, kwargs)
        finally:
            vars(self._module)["forward"] = self
        given = [tensor for _, tensor in leaves(opened((args, kwargs)))]
        places = {id(tensor): place for place, (_, tensor) in enumerate(leaves(opened(shaped.out)))}
        return rebuild(shaped.out, lambda made: self._result(made, places.get(id(made), 0), given))

    def _result(self, made: torch.Tensor, place: int, given: Sequence[torch.Tensor]) -> torch.Tensor:
        if not made.is_meta:  # integers that follow from integers
            return made
        result = self._fixed(made.shape, place, 0)
        for at, tensor in enumerate(given):
            numbers = tensor.detach().nan_to_num(1.0, 1.0, -1.0)
            flat = (torch.view_as_real(numbers) if numbers.is_complex() else numbers).flatten().float()
            size = float(flat.norm())
            along = flat @ self._fixed(flat.shape, -1, 0) / max(size, 1e-12)  # though most of it be zeros
            spread = size / max(len(flat), 1) ** 0.5
            result = result + (along + spread / (1 + spread)) * self._fixed(made.shape, place, at + 1)
            if numbers.shape == result.shape and not numbers.is_complex():
                result = result + 0.5 * numbers
        return result.to(made.dtype)

    def _fixed(self, shape: Sequence[int], place: int, at: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self._name} {place} {at}".encode()))
        return torch.randn(tuple(shape), generator=generator)


__all__ = ["standing_in"]
