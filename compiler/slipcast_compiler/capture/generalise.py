"""One program for prompts of any length, of captures for prompts of several lengths.

The captures are compared event by event. An integer that is not the same in all of them has to be affine in the number
of tokens of one text; a constant tensor that is not of one size has to be the beginning of the longest one, which is
then cut where it is read. Anything else is refused, with the line of the pipeline's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from slipcast.errors import RecipeError
from slipcast_compiler.capture.laws import Series, find_sums
from slipcast_compiler.capture.padding import pad_sources
from slipcast_compiler.capture.program import (
    Affine,
    Call,
    Length,
    Op,
    Program,
    Ref,
    Source,
    Spec,
    held_by,
    operator_of,
    outputs_of,
)
from slipcast_compiler.capture.ranges import checked


def unify(programs: Sequence[Program]) -> Program | None:
    """The first of some captures for prompts of several lengths, if they are one program as they are."""
    try:
        return _Unifier(programs, ()).program()
    except RecipeError:
        return None


def without_insides(program: Program) -> Program:
    """A program of calls alone, but for those of which nothing else says what they do."""
    events = tuple(
        replace(event, inside=None) if isinstance(event, Call) and not event.changed else event
        for event in program.events
    )
    return replace(program, events=events)


def generalise(programs: Sequence[Program]) -> Program:
    """The first program, for texts of all lengths between the shortest and the longest of any.

    RecipeError where the programs do not follow their lengths as the module's docstring says.
    """
    padded = pad_sources(programs)
    return checked(_Unifier(padded, _find_series(padded)).program())


def _find_series(programs: Sequence[Program]) -> tuple[Series, ...]:
    """One for each text that a tokenizer was given, if its length is to be seen: in the shape of what the tokenizer
    gave, or, where that is padded, in its mask."""
    calls: dict[int, list[tuple[Source, ...]]] = {}
    for sources in zip(*(program.needed_sources for program in programs), strict=False):
        if all(source.kind == "prompt" and source.value.ndim == 2 for source in sources):
            calls.setdefault(id(sources[0].tokenized), []).append(sources)
    found: list[Series] = []
    for of_call in calls.values():
        name = f"length_{len(found) + 1}" if found else "length"
        sized = [(each[0], tuple(source.value.shape[1] for source in each)) for each in of_call]
        masks = [each for each in of_call if each[0].detail[-1] == "attention_mask"]
        counted = [(each[0], tuple(int(source.value.sum()) for source in each)) for each in masks]
        for (source, counts), dim in [*((each, 1) for each in sized), *((each, None) for each in counted)]:
            if len(set(counts)) > 1:
                found.append(Series(Length(name, min(counts), max(counts), source.id, dim), counts))
                break
    return tuple(found)


class _Unifier:
    """Programs side by side; `program` is what they have in common."""

    def __init__(self, programs: Sequence[Program], series: Sequence[Series], nested: bool = False) -> None:
        self._programs, self._first, self._series = programs, programs[0], series
        self._own: list[dict[int, int]] = [{} for _ in programs]  # value of a program -> the same of the first
        self._specs, self._memory = dict(self._first.specs), dict(self._first.memory)
        self._cuts: list[Op] = []  # of constants, before the event that reads them
        self._followed: set[str] = set()
        self._nested = nested  # of what is inside of calls: nothing there is computed when capturing
        self._shifts: dict[str, set[int]] = {}  # of lengths that were met: length + shift
        self._multiples: dict[str, set[tuple[int, int]]] = {}  # to which lengths were padded, and their shifts
        self._padded: dict[Any, list[Affine]] = {}
        self._insides: dict[tuple[int, ...], Program] = {}

    def program(self) -> Program:
        """RecipeError where there is none."""
        for sources in self._together([program.needed_sources for program in self._programs], "sources"):
            what = ".".join(map(str, sources[0].detail))
            self._same([source.kind for source in sources], what)
            self._enter([(source.id,) for source in sources], what)
        needed = [sorted(program.needed) for program in self._programs]
        self._same_operators(needed)
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

    def _same_operators(self, needed: Sequence[Sequence[int]]) -> None:
        """RecipeError, with the line, where the programs part."""
        events = [[p.events[place] for place in places] for p, places in zip(self._programs, needed, strict=True)]
        for together in zip(*events, strict=False):
            self._same([operator_of(event) for event in together], together[0].where)
        counts = [len(each) for each in events]
        longest = events[counts.index(max(counts))]
        self._same(counts, longest[min(min(counts), max(counts) - 1)].where)

    def _together(self, lists: Sequence[Sequence[Any]], what: str) -> Any:
        self._same([len(each) for each in lists], f"the number of {what}")
        return zip(*lists, strict=True)

    def _event(self, events: Sequence[Op | Call]) -> Op | Call:
        first = events[0]
        args, kwargs = self._common([(each.args, each.kwargs) for each in events], first.where)
        self._enter([outputs_of(each) for each in events], first.where)
        if isinstance(first, Op):
            return replace(first, args=args, kwargs=kwargs)
        insides = [each.inside for each in events if isinstance(each, Call)]
        inside = self._inside(insides, any(each.changed for each in events if isinstance(each, Call)))
        return replace(first, args=args, kwargs=kwargs, inside=inside, recorded=None if inside else insides[0])

    def _inside(self, insides: Sequence[Program | None], changed: bool) -> Program | None:
        """What a call does inside, where the sizes that it is given, or numbers that it reads, may decide that, or
        where its code does something else now."""
        found = [each for each in insides if each]
        if len(found) < len(insides):
            return None
        sizes = [[each.specs[source.id] for source in each.sources if source.kind == "given"] for each in found]
        if all(each == sizes[0] for each in sizes) and not any(each.guards for each in found) and not changed:
            return None
        key = tuple(map(id, found))
        if key not in self._insides:
            unifier = _Unifier(found, self._series, nested=True)
            self._insides[key] = unifier.program()
            self._followed |= unifier._followed
        return self._insides[key]

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
        if held_by(first) is not None:
            made = object.__new__(type(first))
            vars(made).update(self._common([held_by(value) for value in values], where))
            return made
        return first  # nothing that has a size

    def _constant(self, tensors: Sequence[torch.Tensor], where: str) -> Any:
        """As it is, where it is the same. Of several sizes, the longest one's beginning or end, or a beginning and
        integers after it; integers may each follow a length."""
        first, shapes = tensors[0], [tuple(tensor.shape) for tensor in tensors]
        whole = not (first.is_floating_point() or first.is_complex() or first.dtype == torch.bool)
        if len(set(shapes)) == 1:
            if all(torch.equal(first, tensor) for tensor in tensors[1:]):
                return first
            if not whole and self._nested:
                raise self._refuse("numbers that are the same for every prompt", shapes, where)
            return self._numbers(tensors, where) if whole else first  # what else follows a prompt, verify.py finds
        self._same([tensor.ndim for tensor in tensors], where)
        free = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
        if len(free) > 1:
            raise self._refuse("constants that are the beginning of one that is longer", shapes, where)
        dim, longest = free[0], max(tensors, key=lambda tensor: tensor.shape[free[0]])
        sizes, end = [shape[dim] for shape in shapes], longest.shape[dim]
        size = self._integer(sizes, where)
        common = [_common_beginning(longest, tensor, dim) for tensor in tensors]
        if common == sizes:
            return self._made(torch.ops.aten.slice.Tensor, (longest, dim, 0, size), longest, {dim: size}, where)
        if all(torch.equal(longest.narrow(dim, end - each.shape[dim], each.shape[dim]), each) for each in tensors):
            begin = self._integer([end - each for each in sizes], where)
            return self._made(torch.ops.aten.slice.Tensor, (longest, dim, begin, end), longest, {dim: size}, where)
        rest = max(each - begin for each, begin in zip(sizes, common, strict=True))
        if not whole or rest > min(sizes):
            raise self._refuse("constants that are the beginning of one that is longer", shapes, where)
        before = self._constant([tensor.narrow(dim, 0, tensor.shape[dim] - rest) for tensor in tensors], where)
        after = self._constant([tensor.narrow(dim, tensor.shape[dim] - rest, rest) for tensor in tensors], where)
        return self._made(torch.ops.aten.cat.default, ([before, after], dim), longest, {dim: size}, where)

    def _numbers(self, tensors: Sequence[torch.Tensor], where: str) -> Ref:
        """Integers of one shape, of which each follows a length: scale * length + offset."""
        first = tensors[0]
        laws = [self._integer(each, where) for each in zip(*(each.flatten().tolist() for each in tensors), strict=True)]
        affine = [law for law in laws if isinstance(law, Affine)]
        if len({(law.length, law.padded, law.multiple, law.shift, law.more) for law in affine}) > 1:
            raise self._refuse("integers that follow one length", [list(map(str, laws))], where)
        base = replace(affine[0], scale=1, offset=0) if not (affine[0].padded or affine[0].more) else None
        if base is None:
            raise self._refuse("integers that are a * length + b", [list(map(str, laws))], where)
        scales = [law.scale if isinstance(law, Affine) else 0 for law in laws]
        offsets = [law.offset if isinstance(law, Affine) else law for law in laws]
        scale, offset = (torch.tensor(each, dtype=first.dtype).view(first.shape) for each in (scales, offsets))
        aten = torch.ops.aten
        length = self._made(aten.full.default, ((), base), first[(0,) * first.ndim], {}, where, dtype=first.dtype)
        product = self._made(aten.mul.Tensor, (scale, length), first, {}, where)
        return self._made(aten.add.Tensor, (product, offset), first, {}, where)

    def _made(
        self, function: Any, args: Any, like: torch.Tensor, sizes: Mapping[int, Any], where: str, **kwargs: Any
    ) -> Ref:
        """What an operator makes, before the event that reads it: as `like` is, but for some sizes."""
        value = max(self._memory) + 1
        self._memory[value] = max(self._memory.values()) + 1
        self._specs[value] = tuple(sizes.get(dim, size) for dim, size in enumerate(like.shape)), like.dtype
        self._cuts.append(Op(function, args, kwargs, (value,), where))
        return Ref(value)

    def _integer(self, values: Sequence[int], where: str) -> int | Affine:
        """The number, or the law that it follows."""
        if len(set(values)) == 1:
            return values[0]
        laws = self._laws(tuple(values))
        if len(laws) != 1:
            raise self._refuse("integers that are a * length + b", values, where)
        law = laws[0]
        self._followed |= law.lengths
        if law == Affine(law.length, 1, law.offset):
            self._shifts.setdefault(law.length, {0}).add(law.offset)
        if law.padded and not law.more:
            self._multiples.setdefault(law.length, set()).add((law.multiple, law.shift))
        return law

    def _laws(self, values: tuple[int, ...]) -> list[Affine]:
        known = [law for series in self._series if (law := series.affine(values))]
        if known:
            return known
        key = values, tuple(map(len, self._shifts.values())), tuple(map(len, self._multiples.values()))
        if key not in self._padded:
            shifts = [(series, self._shifts.get(series.length.name, {0})) for series in self._series]
            found = [law for series, each in shifts if (law := series.padded(values, each))]
            self._padded[key] = found or find_sums(self._series, values, self._multiples)
        return self._padded[key]

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


def _common_beginning(one: torch.Tensor, other: torch.Tensor, dim: int) -> int:
    """How much of a dimension two tensors, of which the first is not the shorter one, have the same numbers in."""
    size = other.shape[dim]
    if any(a != b for at, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if at != dim):
        return 0
    same = (one.narrow(dim, 0, size) == other).movedim(dim, 0).reshape(size, -1).all(dim=1)
    return int(same.int().cumprod(0).sum())
