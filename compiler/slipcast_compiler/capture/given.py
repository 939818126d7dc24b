"""What modules of a pipeline are called with, and calling them so for shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from slipcast_compiler.capture.program import leaves, opened, rebuild
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.shapes import ShapeRunner
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.host.quiet import quiet

Given = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs: floats on meta, integers and masks as they are


def given_to(pipe: Any, call: Mapping[str, Any], names: Collection[str]) -> dict[str, Given]:
    """By name, what these modules are given when pipe(**call) first calls them; without those that it does not call."""
    found: dict[str, Given] = {}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(name, rebuild((args, kwargs), lambda leaf: leaf))

        return hook

    with contextlib.ExitStack() as hooks, quiet():
        for name in names:
            handle = module_of(pipe, name).register_forward_pre_hook(hook_for(name), with_kwargs=True)
            hooks.callback(handle.remove)
        capture(pipe, call)
    return found


def call_for_shapes(module: nn.Module, given: Given) -> torch.Tensor:
    """The first tensor that it returns, for its shape. Its weights may be on the meta device."""
    out = ShapeRunner().run(module, "", *given, is_known=lambda tensor: not tensor.is_meta).out
    return next(tensor for _, tensor in leaves(opened(out)))


def given_within(module: nn.Module, given: Given, layers: Iterable[str]) -> list[torch.Tensor]:
    """What these layers of a module are given when it is called so: each tensor once, whichever layers read it. They
    are on the meta device, and so may stay."""
    found: dict[int, torch.Tensor] = {}

    def hook(_: nn.Module, args: Any) -> None:
        found.update({id(each): each for each in args if isinstance(each, torch.Tensor)})

    with contextlib.ExitStack() as hooks:
        for name in layers:
            hooks.callback(module.get_submodule(name).register_forward_pre_hook(hook).remove)
        call_for_shapes(module, given)
    return list(found.values())
