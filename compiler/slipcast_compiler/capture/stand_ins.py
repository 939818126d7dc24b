"""Functions in place of modules, for a program that is compared with its pipeline where the modules take too long.

What is compared is the code between the modules: they are the same in both, and whatever they compute, both have to
give them the same and to do the same with what comes back. So a function of all that they are given, with results of
their shapes, tells as much, in no time and without weights.
"""

from __future__ import annotations

import contextlib
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from slipcast_compiler.capture.program import Call, Program, leaves, opened, rebuild
from slipcast_compiler.capture.replay import find_module
from slipcast_compiler.capture.shapes import ShapeRunner

FEW = 16  # numbers that count one by one, such as timesteps


@contextlib.contextmanager
def standing_in(program: Program, components: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, functions are in the places of the modules that a program calls: of those of which it holds nothing
    but the call, and of none where prompts are padded, as only the modules leave the padding out of account."""
    calls = [event for event in program.events if isinstance(event, Call)]
    held = {call.module for call in calls if call.inside or call.changed or call.written}
    padded = any(source.padding for source in program.needed_sources)
    names = [name for name in dict.fromkeys(call.module for call in calls) if not padded and name not in held]
    modules = {name: find_module(components, name) for name in names}
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    stage = _Stage()
    try:
        for name, module in modules.items():
            vars(module)["forward"] = _StandIn(stage, module, name)
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if before[name]:
                vars(module)["forward"] = before[name]


class _Stage:
    """What stand-ins share. Within `resting` modules do what they do: one may call another."""

    def __init__(self) -> None:
        self.runner, self.rests = ShapeRunner(), False

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        self.rests = True
        try:
            yield
        finally:
            self.rests = False


class _StandIn:
    """Smooth in every number that it is given, so that rounding stays small: features of each tensor, by which the
    result is a sum of fixed tensors. What has the result's shape is part of it too."""

    def __init__(self, stage: _Stage, module: nn.Module, name: str) -> None:
        self._stage, self._module, self._name = stage, module, name
        self._forward: Callable[..., Any] = module.forward
        self.__signature__ = inspect.signature(module.forward)  # pipelines look which arguments a module takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._stage.rests:
            return self._forward(*args, **kwargs)
        with self._stage.resting():
            # Numbers are known here, and may decide; weights are none of them.
            shaped = self._stage.runner.run(self._module, self._name, args, kwargs, lambda tensor: True)
            made = [tensor for _, tensor in leaves(opened(shaped.out))]
            if any(each.is_meta and not (each.is_floating_point() or each.is_complex()) for each in made):
                return self._forward(*args, **kwargs)  # places, of which not every number is one
        places, (numbers, words) = {id(tensor): at for at, tensor in enumerate(made)}, _given((args, kwargs))
        features = [list(_features(tensor)) for tensor in numbers]

        def result(shape: torch.Tensor) -> torch.Tensor:
            if not shape.is_meta:  # it follows from what is given alone
                return shape
            name = f"{places[id(shape)]} {words}"
            parts = [self._sum(shape, f"{name} {part}", features, numbers) for part in range(1 + shape.is_complex())]
            return torch.complex(*parts).to(shape.dtype) if shape.is_complex() else parts[0].to(shape.dtype)

        return rebuild(shaped.out, result)

    def _sum(
        self, made: torch.Tensor, name: str, features: Sequence[Sequence[float]], given: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        found = _fixed(made.shape, f"{self._name} {name}")
        for at, each in enumerate(features):
            for place, feature in enumerate(each):
                found += feature * _fixed(made.shape, f"{self._name} {name} {at} {place}")
            if given[at].shape == made.shape and given[at].is_floating_point():
                found += 0.5 * torch.asinh(given[at].float().nan_to_num())
        return found


def _given(values: Any) -> tuple[list[torch.Tensor], str]:
    """All tensors and numbers of a structure, and in words where they are and what else there is."""
    numbers = [tensor.detach() for _, tensor in leaves(opened(values))]
    words = [f"{[*path]}" for path, _ in leaves(opened(values))]
    for path, leaf in tree_flatten_with_path(values)[0]:
        if isinstance(leaf, int | float):
            numbers.append(torch.tensor(float(leaf)))
        if not isinstance(leaf, torch.Tensor):
            plain = isinstance(leaf, str | bytes | torch.dtype | type(None))
            words.append(f"{path} {leaf if plain else type(leaf).__name__}")
    return numbers, " ".join(words)


def _features(tensor: torch.Tensor) -> Iterator[float]:
    """Of few numbers each, in both of its phases; of many their length, and their product with a fixed vector, though
    most of them be zeros. Of their inverse hyperbolic sine, as masks have numbers that dwarf all others."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = torch.asinh(real.flatten().double().nan_to_num(0.5))
    if len(flat) <= FEW:
        for at, value in enumerate(flat.tolist()):
            phase = torch.tensor(3.0 * value + at)
            yield from (float(torch.sin(phase)), float(torch.cos(phase)))
    else:
        size = float(flat.norm())
        yield float(flat @ _fixed(flat.shape, "vector").double()) / max(size, 1e-12)
        yield size / len(flat) ** 0.5


def _fixed(shape: Sequence[int], name: str) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(shape), generator=generator)
