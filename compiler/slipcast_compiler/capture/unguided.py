"""An evaluation of the model without guidance, beside that of a program with it: for noise levels at which guidance is
not worth its time (Kynkaanniemi et al., arXiv 2404.07724).

The pipeline is captured once more, for a guidance of 1. What its model is given then are values of the program with
guidance, or, of those with two rows, one for each branch, half: both are told by what makes them, operator by operator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from slipcast_compiler.capture.cut import Part, Use, part_of
from slipcast_compiler.capture.driving import not_driven
from slipcast_compiler.capture.program import Call, Op, Program, Ref, Source, operator_of, outputs_of, rebuild, refs

HALVES = "conditioning_halves"
_CAT, _SLICE = torch.ops.aten.cat.default, torch.ops.aten.slice.Tensor
_EXPAND = torch.ops.aten.expand.default
_REPEAT, _UNSQUEEZE = torch.ops.aten.repeat.default, torch.ops.aten.unsqueeze.default
_BY_ROWS = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default,
            torch.ops.aten.detach.default}  # fmt: skip
# Of these sizes the first says how many rows there are; what lies in memory before its middle is of the first branch.
_SIZED = {_EXPAND, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


@dataclass(frozen=True)
class Plain:
    """An evaluation without guidance: a `use` on values of the program with guidance. Some of these are `halves` of
    others: by value, of which, and whether it is the last; they are made by uses of parts, `halving`, before the loop.
    `program`: that without guidance, in whose values the model is given `given`."""

    use: Use
    program: Program
    given: tuple[int, ...]
    halves: Mapping[int, tuple[int, int]]
    halving: tuple[tuple[Part, Use], ...]


@dataclass
class Told:
    """By value, what makes it, from the sources on: of two programs those are equal that are made alike. `halves`: of
    those of two rows, each of another branch, the same of both."""

    whole: dict[int, str]
    halves: dict[int, tuple[str, str]] = field(default_factory=dict)


def match_plain(guided: Program, before: Sequence[Use], plain: Program, use: Use, samples: tuple[int, int]) -> Plain:
    """`use`: an evaluation of the program `plain`, in whose values it is; `before`: the uses before the loop of
    `guided`, whose values are known; `samples`: the latents of both.

    RecipeError where the model is given anything that is no value of `guided`, or half of one.
    """
    own, other = told_by_makers(guided), told_by_makers(plain).whole
    if own.whole[samples[0]] != other[samples[1]]:
        raise not_driven("without guidance it begins with other latents", plain.pipeline)
    known = [*(source.id for source in guided.needed_sources), *(value for each in before for value in each.outputs)]
    whole = {own.whole[value]: value for value in reversed(known)}
    halves = {found: (value, last) for value in known for last, found in enumerate(own.halves.get(value, ()))}
    taken: dict[int, tuple[int, int]] = {}
    inputs, first_free = [], max([*guided.specs, *guided.memory]) + 1
    for value in use.inputs:
        made = other[value]
        if value == samples[1]:
            inputs.append(samples[0])
        elif made in whole:
            inputs.append(whole[made])
        elif made in halves:
            inputs.append(first_free + len(taken))
            taken[inputs[-1]] = halves[made]
        else:
            raise not_driven("without guidance its model is given what guidance does not know", str(value))
    return Plain(replace(use, inputs=tuple(inputs)), plain, use.inputs, taken, _halving(guided, taken))


def told_by_makers(program: Program) -> Told:
    """Of all values, as they are at the end."""
    told = Told(_sources(program))
    for event in program.events:
        _follow(program, event, told)
    return told


def _follow(program: Program, event: Op | Call, told: Told) -> None:
    made = _digest(event, told.whole)
    if isinstance(event, Op) and event.function._schema.is_mutable:  # all that lies in that memory is another now
        into = {program.memory[ref.id] for ref in refs(event.args[:1])}
        for value in [each for each in told.whole if program.memory.get(each) in into]:
            told.whole[value] = hashlib.sha256(f"{told.whole[value]} {made}".encode()).hexdigest()
            told.halves.pop(value, None)
    elif isinstance(event, Op) and len(event.outputs) == 1 and (halves := _halves(program, event, told)):
        told.halves[event.outputs[0]] = halves
    for at, value in enumerate(outputs_of(event)):
        told.whole[value] = f"{made}.{at}"


def _halves(program: Program, event: Op, told: Told) -> tuple[str, str] | None:
    """What makes the halves of what an operator gives, where it joins two branches, or does the same to each row of
    what did."""
    if event.function is _CAT:
        parts = event.args[0]
        both = len(parts) == 2 and all(isinstance(each, Ref) for each in parts)
        if both and (event.args[1:] or (0,))[0] == 0 and program.specs[parts[0].id] == program.specs[parts[1].id]:
            return told.whole[parts[0].id], told.whole[parts[1].id]
        return None
    given = refs((event.args, event.kwargs))
    if (
        len(given) != 1
        or given[0].id not in told.halves
        or (of_half := _of_half(event, program.specs[given[0].id][0])) is None
    ):
        return None
    one, other = (_digest(of_half, {given[0].id: half}) for half in told.halves[given[0].id])
    return f"{one}.0", f"{other}.0"


def _of_half(event: Op, shape: tuple[Any, ...]) -> Op | None:
    """The operator as it is for half of the rows of what has this shape; None where it does not do the same to each, or
    puts a dimension before them."""
    if event.function in _BY_ROWS or (event.function is _UNSQUEEZE and event.args[1] > 0):
        return event
    if event.function is _REPEAT:
        return event if len(event.args[1]) == len(shape) and event.args[1][0] == 1 else None
    if event.function not in _SIZED:
        return None
    first, *rest = event.args[1]
    repeated = event.function is _EXPAND and (len(rest) + 1, first) != (len(shape), shape[0])
    if repeated or not isinstance(first, int) or first % 2:
        return None
    return replace(event, args=(event.args[0], [first // 2, *rest], *event.args[2:]))


def _digest(event: Op | Call, known: Mapping[int, str]) -> str:
    inside = event.inside if isinstance(event, Call) else None

    def told(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return known[leaf.id]
        if isinstance(leaf, torch.Tensor):
            return str(leaf.dtype), tuple(leaf.shape), _bytes(leaf)
        return repr(leaf)

    given = repr((operator_of(event), inside and inside.digest, rebuild((event.args, event.kwargs), told)))
    return hashlib.sha256(given.encode()).hexdigest()


def _bytes(tensor: torch.Tensor) -> str:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _sources(program: Program) -> dict[int, str]:
    """Texts are told apart by what they are, draws by their order."""
    found, draws = dict[int, str](), 0
    for source in program.sources:
        draws += source.kind == "noise"
        found[source.id] = f"{source.kind} {source.detail} {draws if source.kind == 'noise' else _text(source)}"
    return found


def _text(source: Source) -> str:
    if source.kind != "prompt":
        return ""
    return repr((source.tokenized and source.tokenized.texts, source.padding, _bytes(source.value)))


def _halving(program: Program, taken: Mapping[int, tuple[int, int]]) -> tuple[tuple[Part, Use], ...]:
    """Parts that give halves, those that depend on the same together; `taken`: as Plain.halves."""
    specs, memory, events = dict(program.specs), dict(program.memory), dict[Any, list[Op]]()
    for value, (of, last) in taken.items():
        (rows, *rest), dtype = specs[of]
        if not isinstance(rows, int) or rows % 2:
            raise not_driven("its branches are not two halves", str(rows))
        half = rows // 2
        specs[value], memory[value] = ((half, *rest), dtype), value
        made = Op(_SLICE, (Ref(of), 0, half * last, half * (last + 1)), {}, (value,))
        events.setdefault(program.binding[of], []).append(made)
    changed = replace(program, specs=specs, memory=memory)
    names = (HALVES if place == 0 else f"{HALVES}_{place + 1}" for place in range(len(events)))
    return tuple(
        part_of(name, changed, each, frozenset(value for op in each for value in op.outputs))
        for name, each in zip(names, events.values(), strict=True)
    )
