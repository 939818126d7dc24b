"""A part of a program as a module: its forward replays the part's events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from slipcast.errors import RecipeError
from slipcast_compiler.capture.cut import Part
from slipcast_compiler.capture.program import Call, Spec, measure
from slipcast_compiler.capture.replay import Values, find_module, run

# What engines take and give in place of what they do not: the same numbers, but for float64's last digits.
CARRIERS = {torch.float64: torch.float32, torch.bool: torch.int64}
PLAIN = (torch.float32, torch.int64, torch.int32)


class Replayed(nn.Module):  # type: ignore[misc]
    """forward(*inputs, *table): the part's inputs, then one row of each of its tables; returns a tuple of its outputs,
    all of them in the dtypes that engines have.

    `components`: the pipeline's; those that the part calls, or takes weights of, become its own modules. `known`: what
    the inputs are in the program.
    """

    def __init__(self, part: Part, components: Mapping[str, nn.Module], known: Mapping[int, Spec]) -> None:
        super().__init__()
        self._part = part
        self._dtypes = [known[value][1] for value in part.inputs] + [rows.dtype for _, rows in part.table]
        used = {event.module.partition(".")[0] for event in part.events if isinstance(event, Call)}
        used |= {name.partition(".")[0] for _, name in part.weights}
        self.components = nn.ModuleDict({name: components[name] for name in sorted(used)})

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        part, components = self._part, dict(self.components.items())
        values = self._entered(given)
        lengths = measure(part.lengths, values)
        for event in part.events:
            run(event, values, components, lengths)
        return tuple(carried(values[value]) for value in part.outputs)

    def _entered(self, given: Sequence[torch.Tensor]) -> Values:
        """What the events read that none of them makes."""
        part, components = self._part, dict(self.components.items())
        names = (*part.inputs, *(value for value, _ in part.table))
        own = [tensor.to(dtype) for tensor, dtype in zip(given, self._dtypes, strict=True)]
        values = dict(zip(names, own, strict=True))
        for value, name in part.weights:
            module, _, own_name = name.rpartition(".")
            values[value] = getattr(find_module(components, module), own_name)
        return values


def as_recorded(part: Part) -> Part:
    """The part, whose modules are what they did when they were recorded, where that is known; else the same one."""
    events = tuple(
        replace(event, inside=event.recorded) if isinstance(event, Call) and event.recorded else event
        for event in part.events
    )
    return part if events == part.events else replace(part, events=events)


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype in which engines hand it on; RecipeError for what they cannot, such as complex numbers."""
    dtype = CARRIERS.get(tensor.dtype, tensor.dtype)
    if dtype not in PLAIN:
        raise RecipeError(
            "the pipeline hands on what engines cannot",
            expected=", ".join(str(each).removeprefix("torch.") for each in (*PLAIN, *CARRIERS)),
            got=str(tensor.dtype).removeprefix("torch."),
        )
    return tensor.to(dtype)
