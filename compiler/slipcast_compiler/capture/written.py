"""A program without writes: what is written into memory becomes a new tensor, and views of that memory are made anew.

Parts of a program are engines, which hand tensors on: none of them can write into what another one holds, as a pipeline
does that puts each step's result into a part of its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from slipcast_compiler.capture.program import Call, Mark, Op, Program, Ref, outputs_of, rebuild

_ATEN = torch.ops.aten
Shape = tuple[int, ...]


def without_writes(program: Program) -> Program | None:
    """The same program; None where an operator writes through a view that has no way back."""
    try:
        return _Rewriter(program).program()
    except _NoWayBackError:
        return None


class _NoWayBackError(Exception):
    """Of an operator that is not known here."""


class _Rewriter:
    def __init__(self, program: Program) -> None:
        self._old = program
        self._events: list[Op | Call] = []
        self._specs, self._memory = dict(program.specs), dict(program.memory)
        self._count, self._homes = max(self._memory, default=0), max(self._memory.values(), default=0)
        self._views: dict[int, tuple[int, Op | None]] = {}  # value -> what it is a view of, and the operator
        self._now: dict[int, int] = {}  # value -> that which has its numbers; itself, if it is not here
        self._stale: set[int] = set()

    def program(self) -> Program:
        old, marks = self._old, list[Mark]()
        begins = dict[int, Mark]()
        for place, event in enumerate([*old.events, None]):
            for number, mark in enumerate(old.marks):
                if mark.end == place:
                    marks.append(replace(begins[number], result=self._read(mark.result), end=len(self._events)))
                if mark.begin == place:
                    given = {"output": self._read(mark.output), "sample": self._read(mark.sample)}
                    begins[number] = replace(mark, **given, begin=len(self._events))
            if event is not None:
                self._take(event)
        results = tuple((path, self._read(value)) for path, value in old.results)
        return replace(
            old, events=tuple(self._events), marks=tuple(marks), results=results, specs=self._specs,
            memory=self._memory,
        )  # fmt: skip

    def _take(self, event: Op | Call) -> None:
        args, kwargs = rebuild((event.args, event.kwargs), self._read)
        if isinstance(event, Op) and event.function._schema.is_mutable:
            return self._write(event, args, kwargs)
        self._events.append(replace(event, args=args, kwargs=kwargs))
        first = event.args[0] if event.args else None
        for value in outputs_of(event):
            if isinstance(event, Op) and isinstance(first, Ref) and self._is_view(value, first.id):
                self._views[value] = first.id, event
        return None

    def _is_view(self, value: int, of: int) -> bool:
        return self._old.memory[value] == self._old.memory[of]

    def _write(self, event: Op, args: Any, kwargs: Any) -> None:
        """An operator that writes into its first argument gives a new one; so do all that this is a view of."""
        target, made = event.args[0], self._new(event.args[0].id)
        self._events.append(Op(_pure(event), args, kwargs, (made,), event.where))
        storage, fresh = self._old.memory[target.id], {target.id: made}
        value = target.id
        while value in self._views:
            of, view = self._views[value]
            fresh[of] = fresh[value] if view is None else self._put_back(view, of, fresh[value])
            value = of
        self._stale |= {each for each, home in self._old.memory.items() if home == storage and each in self._views}
        self._now |= fresh
        self._stale -= fresh.keys()
        for output in event.outputs:
            self._views[output] = target.id, None
            self._stale.add(output)

    def _put_back(self, view: Op, of: int, part: int) -> int:
        """The tensor that something is a view of, with that in its place."""
        name = view.function._schema.name.removeprefix("aten::")
        shape = tuple(size for size in self._old.specs[of][0] if isinstance(size, int))
        if name not in _BACK:
            raise _NoWayBackError
        function, args = _BACK[name](self._ref(of), Ref(part), view, shape)
        made = self._new(of)
        self._events.append(Op(function, args, {}, (made,), view.where))
        return made

    def _read(self, value: Any) -> Any:
        return self._ref(value.id) if isinstance(value, Ref) else value

    def _ref(self, value: int) -> Ref:
        """What has a value's numbers now."""
        if value in self._stale:
            of, view = self._views[value]
            whole = self._ref(of)
            if view is None:
                self._now[value] = whole.id
            else:
                self._now[value] = self._new(value)
                self._events.append(replace(view, args=(whole, *view.args[1:]), outputs=(self._now[value],)))
            self._stale.discard(value)
        return Ref(self._now.get(value, value))

    def _new(self, like: int) -> int:
        self._count, self._homes = self._count + 1, self._homes + 1
        self._memory[self._count], self._specs[self._count] = self._homes, self._specs[like]
        return self._count


def _pure(event: Op) -> Any:
    """The operator that gives what this one writes into its first argument."""
    name, overload = event.function._schema.name.removeprefix("aten::"), event.function._overloadname
    written = [each for each in event.function._schema.arguments if each.alias_info and each.alias_info.is_write]
    packet = getattr(_ATEN, name.removesuffix("_"), None) if name.endswith("_") else None
    if len(written) != 1 or packet is None or overload not in packet.overloads() or len(event.outputs) > 1:
        raise _NoWayBackError
    return getattr(packet, overload)


def _slice(whole: Ref, part: Ref, view: Op, _: Shape) -> tuple[Any, tuple[Any, ...]]:
    return _ATEN.slice_scatter.default, (whole, part, *view.args[1:])


def _select(whole: Ref, part: Ref, view: Op, _: Shape) -> tuple[Any, tuple[Any, ...]]:
    return _ATEN.select_scatter.default, (whole, part, *view.args[1:])


def _strided(whole: Ref, part: Ref, view: Op, _: Shape) -> tuple[Any, tuple[Any, ...]]:
    return _ATEN.as_strided_scatter.default, (whole, part, *view.args[1:])


def _shaped(_: Ref, part: Ref, view: Op, shape: Shape) -> tuple[Any, tuple[Any, ...]]:
    return _ATEN.reshape.default, (part, list(shape))


def _turned(_: Ref, part: Ref, view: Op, shape: Shape) -> tuple[Any, tuple[Any, ...]]:
    return _ATEN.transpose.int, (part, *view.args[1:])


def _permuted(_: Ref, part: Ref, view: Op, shape: Shape) -> tuple[Any, tuple[Any, ...]]:
    order = [dim % len(shape) for dim in view.args[1]]
    return _ATEN.permute.default, (part, [order.index(dim) for dim in range(len(shape))])


# By view, how what it is of comes back from what was written through it.
_BACK: Mapping[str, Callable[[Ref, Ref, Op, Shape], tuple[Any, tuple[Any, ...]]]] = {
    "slice": _slice,
    "select": _select,
    "as_strided": _strided,
    "view": _shaped,
    "_unsafe_view": _shaped,
    "reshape": _shaped,
    "unsqueeze": _shaped,
    "squeeze": _shaped,
    "alias": _shaped,
    "detach": _shaped,
    "t": lambda _, part, view, shape: (_ATEN.t.default, (part,)),
    "transpose": _turned,
    "permute": _permuted,
}
