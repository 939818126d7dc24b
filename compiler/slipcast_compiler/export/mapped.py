"""Operators on what some images have each: tensors [images, *what it is of one].

As torch.vmap, but with a number of images that is free while a graph is traced, which that takes for the example's. An
operator's dimensions are moved by one, and its sizes begin with the number of images; the others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipcast.errors import RecipeError

_ATEN = torch.ops.aten
ALONG = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim")  # arguments that tell dimensions
SIZES = ("size", "shape")
# Beside those that are pointwise: each image's result follows from its own, whatever other arguments tell.
EACH = frozenset(
    (
        _ATEN.cat, _ATEN.stack, _ATEN.chunk, _ATEN.split, _ATEN.split_with_sizes, _ATEN.select, _ATEN.slice,
        _ATEN.narrow, _ATEN.unbind, _ATEN.unsqueeze, _ATEN.squeeze, _ATEN.transpose, _ATEN.permute, _ATEN.flip,
        _ATEN.mean, _ATEN.sum, _ATEN.std, _ATEN.var, _ATEN.linalg_vector_norm, _ATEN.norm, _ATEN.softmax, _ATEN.amax,
        _ATEN.amin, _ATEN.view, _ATEN.reshape, _ATEN._unsafe_view, _ATEN.expand, _ATEN.flatten, _ATEN.unflatten,
        _ATEN.clone, _ATEN.contiguous, _ATEN.detach, _ATEN.alias, _ATEN._to_copy, _ATEN.to, _ATEN.zeros_like,
        _ATEN.ones_like, _ATEN.full_like, _ATEN.lift_fresh,
    )
)  # fmt: skip
NEED_ALONG = frozenset(
    (
        _ATEN.mean, _ATEN.sum, _ATEN.std, _ATEN.var, _ATEN.squeeze, _ATEN.linalg_vector_norm, _ATEN.norm, _ATEN.amax,
        _ATEN.amin,
    )
)  # fmt: skip


def apply(function: Any, args: Any, kwargs: Mapping[str, Any], images: Any, is_own: Any) -> Any:
    """What the operator gives of each. `is_own`: whether a tensor among the arguments is [images, ...]; one that is not
    is the same for all. RecipeError for an operator that is not known to treat them alike."""
    schema = function._schema
    given = dict(zip((each.name for each in schema.arguments), args, strict=False)) | dict(kwargs)
    packet = function.overloadpacket
    pointwise = torch.Tag.pointwise in function.tags
    if not pointwise and packet not in EACH:
        raise RecipeError(f"{schema.name} is not known to treat images alike")
    rank = max(each.ndim - is_own(each) for value in given.values() for each in _tensors(value))
    if pointwise:
        found = {name: _aligned(value, rank, is_own) for name, value in given.items()}
        return function(**found)
    if packet in (_ATEN.cat, _ATEN.stack):
        given = {name: _repeated(value, images, is_own) for name, value in given.items()}
    told = {each.name: each.default_value for each in schema.arguments if each.has_default_value()} | given
    along = [name for name in told if name in ALONG and told[name] not in (None, [], ())]
    if packet in NEED_ALONG and not along:
        raise RecipeError(f"{schema.name} is of all dimensions")
    for name in along:
        given[name] = _moved(told[name])
    if packet is _ATEN.permute:
        given["dims"] = [0, *given["dims"]]
    if packet is _ATEN.expand:
        if any(isinstance(size, int) and size == -1 for size in given["size"]):
            raise RecipeError(f"{schema.name} keeps sizes that it does not name")
        given["self"] = _aligned(given["self"], len(given["size"]), is_own)
    for name in SIZES:
        if name in given:
            given[name] = [images, *given[name]]
    given.pop("memory_format", None)  # of so many dimensions
    return function(**given)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for each in value if isinstance(each, torch.Tensor)] if isinstance(value, list | tuple) else []


def _aligned(value: Any, rank: int, is_own: Any) -> Any:
    """With as many dimensions of an image as the operator broadcasts to."""
    if not isinstance(value, torch.Tensor) or not is_own(value):
        return value
    for _ in range(rank - (value.ndim - 1)):
        value = value.unsqueeze(1)
    return value


def _repeated(value: Any, images: Any, is_own: Any) -> Any:
    """Tensors of a list, those that are the same for all with the number of images."""
    if not isinstance(value, list | tuple):
        return value
    return [each if is_own(each) else each.unsqueeze(0).expand(images, *each.shape) for each in value]


def _moved(dims: Any) -> Any:
    """Those that are not counted from the end are one further."""
    if isinstance(dims, list | tuple):
        return [_moved(dim) for dim in dims]
    return dims + 1 if dims >= 0 else dims
