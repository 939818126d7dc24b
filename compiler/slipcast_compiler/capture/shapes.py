"""Run a module for the shapes of its outputs: floating-point tensors on torch's meta device, integers for real.

So no weight is read, and code that branches on integers (lengths, masks, position ids) finds what it would find.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

META = torch.device("meta")


def run_for_shapes(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """What the module returns, with zeros in place of numbers that need its weights."""
    args, kwargs = tree_map(_to_meta, (args, kwargs))
    with torch.no_grad(), _Shapes():
        return module(*args, **kwargs)


class _Shapes(TorchDispatchMode):  # type: ignore[misc]
    """Operators whose tensors are all on the CPU run there; where one is on meta, so are all."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if all(tensor.device != META for tensor in tensors):
            made = func(*args, **kwargs)
            # Integers stay real where a module makes or moves them "where its weights are".
            if kwargs.get("device") == META and not (made.is_floating_point() or made.is_complex()):
                made = func(*args, **kwargs | {"device": torch.device("cpu")})
            return made
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
            args = (args[0], _as_places(args[1]), *args[2:])
        args, kwargs = tree_map(_all_to_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = META
        return func(*args, **kwargs)


def _as_places(indices: Any) -> list[Any]:
    """Masks as the places where they are true, of which there are as many as the real mask says."""
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and index.device != META:
            found += list(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def _to_meta(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return value.to(META) if floating else value


def _all_to_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
