"""Whether ONNX has a form of all that a program runs: asked before anything is traced, which takes time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from slipcast.errors import RecipeError
from slipcast_compiler.capture.cut import Part
from slipcast_compiler.capture.program import Call, Op
from slipcast_compiler.export.component import OPSET
from slipcast_compiler.export.forms import FORMS, NEAREST


def check_operators(parts: Sequence[Part]) -> None:
    """RecipeError for an operator that the exporter neither knows nor takes apart."""
    for part in parts:
        for event in _operators(part.events):
            if not _is_known(event.function):
                raise RecipeError(
                    f"{part.name} cannot be exported",
                    expected="operators that ONNX has",
                    got=f"{event.function} at {event.where or 'an unknown place'}",
                    hint="the pipeline's code, an argument of it, or a newer torch may avoid it",
                )


def _operators(events: Sequence[Op | Call]) -> Iterator[Op]:
    for event in events:
        if isinstance(event, Op):
            yield event
        elif inside := event.inside or event.recorded:
            yield from _operators(inside.events)


@functools.cache
def _is_known(operator: Any) -> bool:
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace != "aten":
        return True  # of Python, on sizes
    if operator in FORMS or operator in NEAREST:
        return True
    registry, decomposed = _tables()
    if registry.is_registered(operator) or operator in decomposed or operator._can_decompose():
        return True
    return operator.is_view or bool(operator._schema.is_mutable)  # which tracing takes out


@functools.cache
def _tables() -> tuple[Any, frozenset[Any]]:
    """The exporter's own: the operators that it knows, and those that it takes apart."""
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib(OPSET)
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    return registry, frozenset(_decomp.create_onnx_friendly_decomposition_table(known))
