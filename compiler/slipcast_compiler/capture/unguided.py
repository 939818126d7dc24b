"""An evaluation of the model without guidance, beside that of a program with it: for noise levels at which guidance is
not worth its time (Kynkaanniemi et al., arXiv 2404.07724).

The pipeline is captured once more, for a guidance of 1. What its model is given then are values of the program with
guidance, or, of those with two rows, one for each branch, half: both are told by what makes them, operator by operator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slipcast_compiler.capture.cut import Part, Use, part_of
from slipcast_compiler.capture.driving import not_driven
from slipcast_compiler.capture.program import Call, Op, Program, Ref, Source, operator_of, outputs_of, rebuild, refs

HALVES = "conditioning_halves"
_CAT, _SLICE = torch.ops.aten.cat.default, torch.ops.aten.slice.Tensor
# What does the same to each row, of one tensor; of repeat, where rows are not repeated.
_BY_ROWS = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default,
            torch.ops.aten.detach.default}  # fmt: skip
_REPEAT = torch.ops.aten.repeat.default


@dataclass(frozen=True)
class Plain:
    """An evaluation without guidance: a `use` on values of the program with guidance, some of which `halving` makes of
    others, before the loop: a use of the part `halves`."""

    use: Use
    halving: Use | None
    halves: Part | None


def match_plain(guided: Program, before: Sequence[Use], plain: Program, use: Use, samples: tuple[int, int]) -> Plain:
    """`use`: an evaluation of the program `plain`, in whose values it is; `before`: the uses before the loop of
    `guided`, whose values are known; `samples`: the latents of both.

    RecipeError where the model is given anything that is no value of `guided`, or half of one.
    """
    own, other = told_by_makers(guided), told_by_makers(plain)
    if own[samples[0]] != other[samples[1]]:
        raise not_driven("without guidance it begins with other latents", plain.pipeline)
    known = [*(source.id for source in guided.needed_sources), *(value for each in before for value in each.outputs)]
    whole = {own[value]: value for value in reversed(known)}
    halves = {found: (value, last) for value in known for last, found in enumerate(_halves(guided, own).get(value, ()))}
    taken: dict[int, tuple[int, int]] = {}  # by new value, what it is half of, and which
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
    part, halving = _halving(guided, taken) if taken else (None, None)
    return Plain(replace(use, inputs=tuple(inputs)), halving, part)


def told_by_makers(program: Program) -> dict[int, str]:
    """By value, a digest of what makes it, from the sources on; of two programs those are equal that are made alike."""
    found = _sources(program)
    for event in program.events:
        _follow(program, event, found, found)
    return found


def _follow(program: Program, event: Op | Call, known: Mapping[int, str], found: dict[int, str]) -> None:
    """Puts what an event gives into `found`; `known`: what it is given."""
    made = _digest(event, known)
    for at, value in enumerate(outputs_of(event)):
        found[value] = f"{made}.{at}"
    if isinstance(event, Op) and event.function._schema.is_mutable:  # all that lies in that memory is another now
        into = {program.memory[ref.id] for ref in refs(event.args[:1])}
        for value in [each for each in found if program.memory.get(each) in into and each not in outputs_of(event)]:
            found[value] = hashlib.sha256(f"{found[value]} {made}".encode()).hexdigest()


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


def _halves(program: Program, own: Mapping[int, str]) -> dict[int, tuple[str, str]]:
    """By value of two rows, each from another branch, what makes its first and its last half."""
    found: dict[int, tuple[str, str]] = {}
    for event in program.events:
        given = refs((event.args, event.kwargs))
        if not isinstance(event, Op) or len(event.outputs) != 1:
            continue
        (value,) = event.outputs
        if event.function is _CAT and len(given) == 2 and (event.args[1:] or (0,))[0] == 0 and not event.kwargs:
            one, other = given
            if program.specs[one.id] == program.specs[other.id]:
                found[value] = own[one.id], own[other.id]
        elif len(given) == 1 and given[0].id in found and _is_by_rows(event):
            made = [_digest(event, {given[0].id: half}) for half in found[given[0].id]]
            found[value] = f"{made[0]}.0", f"{made[1]}.0"
    return found


def _is_by_rows(event: Op) -> bool:
    return event.function in _BY_ROWS or (event.function is _REPEAT and event.args[1][0] == 1)


def _halving(program: Program, taken: Mapping[int, tuple[int, int]]) -> tuple[Part, Use]:
    """A part that gives halves; `taken`: by value, see match_plain."""
    specs, memory, events = dict(program.specs), dict(program.memory), []
    for value, (of, last) in taken.items():
        (rows, *rest), dtype = specs[of]
        if not isinstance(rows, int) or rows % 2:
            raise not_driven("its branches are not two halves", str(rows))
        half = rows // 2
        specs[value], memory[value] = ((half, *rest), dtype), value
        events.append(Op(_SLICE, (Ref(of), 0, half * last, half * (last + 1)), {}, (value,)))
    return part_of(HALVES, replace(program, specs=specs, memory=memory), events, frozenset(taken))
