"""One program for prompts of any length, of captures for prompts of several lengths.

The captures are compared event by event. An integer that is not the same in all of them has to be affine in the number
of tokens of one text; a constant tensor that is not of one size has to be the beginning of the longest one, which is
then cut where it is read. Anything else is refused, with the line of the pipeline's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slipcast.errors import RecipeError
from slipcast_compiler.capture.padding import pad_sources
from slipcast_compiler.capture.program import Affine, Call, Length, Op, Program, Ref, Source, Spec, outputs_of

DISTINCT = 3  # lengths of a text: two make a law, and the third checks it


@dataclass(frozen=True)
class _Series:
    """A length, and how long the text is in each of the captures."""

    length: Length
    counts: tuple[int, ...]


def is_of_one_length(programs: Sequence[Program]) -> bool:
    """Whether captures for prompts of several lengths are one program as they are."""
    try:
        _Unifier(programs, ()).program()
    except RecipeError:
        return False
    return True


def generalise(programs: Sequence[Program]) -> Program:
    """The first program, for texts of all lengths between the shortest and the longest of any.

    RecipeError where the programs do not follow their lengths as the module's docstring says.
    """
    padded = pad_sources(programs)
    return _Unifier(padded, _find_series(padded)).program()


def _find_series(programs: Sequence[Program]) -> tuple[_Series, ...]:
    """One for each text that a tokenizer was given, if its length is to be seen: in the shape of what the tokenizer
    gave, or, where that is padded, in its mask."""
    calls: dict[int, list[tuple[Source, ...]]] = {}
    for sources in zip(*(program.needed_sources for program in programs), strict=False):
        if all(source.kind == "prompt" and source.value.ndim == 2 for source in sources):
            calls.setdefault(id(sources[0].tokenized), []).append(sources)
    found: list[_Series] = []
    for of_call in calls.values():
        name = f"length_{len(found) + 1}" if found else "length"
        sized = [(each[0], tuple(source.value.shape[1] for source in each)) for each in of_call]
        masks = [each for each in of_call if each[0].detail[-1] == "attention_mask"]
        counted = [(each[0], tuple(int(source.value.sum()) for source in each)) for each in masks]
        for (source, counts), dim in [*((each, 1) for each in sized), *((each, None) for each in counted)]:
            if len(set(counts)) > 1:
                found.append(_Series(Length(name, min(counts), max(counts), source.id, dim), counts))
                break
    return tuple(found)


class _Unifier:
    """Programs side by side; `program` is what they have in common."""

    def __init__(self, programs: Sequence[Program], series: Sequence[_Series]) -> None:
        self._programs, self._first, self._series = programs, programs[0], series
        self._own: list[dict[int, int]] = [{} for _ in programs]  # value of a program -> the same of the first
        self._specs, self._memory = dict(self._first.specs), dict(self._first.memory)
        self._cuts: list[Op] = []  # of constants, before the event that reads them
        self._followed: set[str] = set()

    def program(self) -> Program:
        """RecipeError where there is none."""
        for sources in self._together([program.needed_sources for program in self._programs], "sources"):
            what = ".".join(map(str, sources[0].detail))
            self._same([source.kind for source in sources], what)
            self._enter([(source.id,) for source in sources], what)
        needed = [sorted(program.needed) for program in self._programs]
        aligned = {places[0]: places for places in self._together(needed, "operators and calls")}
        events, begins = list[Op | Call](), list[int]()
        for place, event in enumerate(self._first.events):
            begins.append(len(events))
            if place in aligned:
                pairs = zip(self._programs, aligned[place], strict=True)
                event = self._event([program.events[of_program] for program, of_program in pairs])
            events += [*self._cuts, event]
            self._cuts.clear()
        begins.append(len(events))
        marks = tuple(replace(mark, begin=begins[mark.begin], end=begins[mark.end]) for mark in self._first.marks)
        lengths = tuple(series.length for series in self._series if series.length.name in self._followed)
        return replace(
            self._first, events=tuple(events), marks=marks, specs=self._specs, memory=self._memory, lengths=lengths
        )

    def _together(self, lists: Sequence[Sequence[Any]], what: str) -> Any:
        self._same([len(each) for each in lists], f"the number of {what}")
        return zip(*lists, strict=True)

    def _event(self, events: Sequence[Op | Call]) -> Op | Call:
        first = events[0]
        self._same([str(each.function) if isinstance(each, Op) else each.module for each in events], first.where)
        args, kwargs = self._common([(each.args, each.kwargs) for each in events], first.where)
        self._enter([outputs_of(each) for each in events], first.where)
        return replace(first, args=args, kwargs=kwargs)

    def _enter(self, values: Sequence[tuple[int, ...]], where: str) -> None:
        """Values that are made at the same place."""
        for same in self._together(values, "values"):
            for own, value in zip(self._own, same, strict=True):
                own[value] = same[0]
            specs: list[Spec] = [program.specs[value] for program, value in zip(self._programs, same, strict=True)]
            shapes = self._together([shape for shape, _ in specs], "dimensions")
            self._specs[same[0]] = tuple(self._integer(sizes, where) for sizes in shapes), specs[0][1]

    def _common(self, values: Sequence[Any], where: str) -> Any:
        """What arguments have in common."""
        first = values[0]
        self._same([type(value).__name__ for value in values], where)
        match first:
            case Ref():
                self._same([own[value.id] for own, value in zip(self._own, values, strict=True)], where)
                return first
            case torch.Tensor():
                return self._constant(values, where)
            case dict():
                self._same([list(value) for value in values], where)
                return {key: self._common([value[key] for value in values], where) for key in first}
            case list() | tuple():
                self._same([len(value) for value in values], where)
                parts = [self._common(inner, where) for inner in zip(*values, strict=True)]
                return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
            case bool() | float() | str():
                self._same(values, where)
                return first
            case int():
                return self._integer(values, where)
        return first  # an object of the pipeline's own, or nothing that has a size

    def _constant(self, tensors: Sequence[torch.Tensor], where: str) -> Any:
        """Of one shape, as it is: what follows a prompt otherwise than by its length, verify.py finds."""
        first = tensors[0]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) == 1:
            return first
        self._same([first.ndim for first in tensors], where)
        free = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
        longest = max(tensors, key=lambda tensor: tensor.shape[free[0]])
        size = self._integer([shape[free[0]] for shape in shapes], where)
        for tensor in tensors:
            if len(free) > 1 or not torch.equal(longest.narrow(free[0], 0, tensor.shape[free[0]]), tensor):
                raise self._refuse("constants that are the beginning of one that is longer", shapes, where)
        value = max(self._memory) + 1
        self._memory[value] = max(self._memory.values()) + 1
        self._specs[value] = tuple(size if dim in free else each for dim, each in enumerate(shapes[0])), first.dtype
        self._cuts.append(Op(torch.ops.aten.slice.Tensor, (longest, free[0], 0, size), {}, (value,), where))
        return Ref(value)

    def _integer(self, values: Sequence[int], where: str) -> int | Affine:
        """The number, or the law that it follows."""
        if len(set(values)) == 1:
            return values[0]
        laws = [law for series in self._series if (law := _law(series, values))]
        if len(laws) != 1:
            raise self._refuse("integers that are a * length + b, of the length of one text", values, where)
        self._followed.add(laws[0].length)
        return laws[0]

    def _same(self, values: Sequence[Any], where: str) -> None:
        if any(value != values[0] for value in values):
            raise self._refuse("the same for every prompt", values, where)

    def _refuse(self, expected: str, values: Sequence[Any], where: str) -> RecipeError:
        lengths = " and ".join(str(list(series.counts)) for series in self._series)
        return RecipeError(
            f"{self._first.pipeline}: the length of a prompt decides what the pipeline does",
            expected=expected,
            got=f"{', '.join(map(str, values))} at {where or 'an unknown place'}"
            + (f", for texts of {lengths} tokens" if lengths else ""),
            hint="an argument of the pipeline may pad its prompts to one length",
        )


def _law(series: _Series, values: Sequence[int]) -> Affine | None:
    """That gives these values for these lengths; None where there is none, or where too few were captured to tell."""
    counts = series.counts
    if len(set(counts)) < DISTINCT:
        return None
    low, high = counts.index(min(counts)), counts.index(max(counts))
    scale = (values[high] - values[low]) // (counts[high] - counts[low])
    law = Affine(series.length.name, scale, values[low] - scale * counts[low])
    return law if [law.at({law.length: count}) for count in counts] == list(values) else None
