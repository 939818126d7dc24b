"""What a component does inside, for arguments of one size: a program of its own.

A component's Python may count the tokens of a mask, pad lists to a multiple, or loop over lengths. A tracer with
symbols for sizes stops there. Here the component has run with integers that are real, so what it read into Python are
numbers, as in the pipeline's own code, and captures for several lengths are made one program in the same way.

Everything is recorded, what is made of constants too: positions that follow a length are operators on it, not tables.
Operators are seen before torch takes them apart (linear, attention), as exporters want them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch._C._functorch import is_batchedtensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slipcast_compiler.capture.edges import leaving_watched
from slipcast_compiler.capture.live import fused_attention
from slipcast_compiler.capture.program import (
    Guard,
    Kind,
    Op,
    Path,
    Program,
    Ref,
    Source,
    Spec,
    leaves,
    leaves_at,
    outputs_of,
    rebuild,
    refs,
)
from slipcast_compiler.capture.where import here

CPU = torch.device("cpu")
_INDEXING = ("index", "index_put", "index_put_")
_PLACES = ("nonzero", "nonzero_numpy")
_READS = frozenset({"item", "_local_scalar_dense", "masked_select", "is_nonzero", *_PLACES})


class _UnknownErrorError(Exception):
    """A tensor on meta that came from nowhere, such as an operator of higher order."""


class Inside(SchemaCheckMode):  # type: ignore[misc]
    """Within it, operators are recorded; `program` is what came of them.

    It is a mode of the dispatcher's first key. torch lets three classes there, of which this is the one that does
    nothing else with operators; all of its methods are replaced. `decides`: is called with a tensor whose numbers are
    read into Python. `failed`: whether what it does cannot be told.
    """

    def __init__(self, module: torch.nn.Module, name: str, given: Any, decides: Callable[..., None]) -> None:
        TorchDispatchMode.__init__(self, _dispatch_key=torch._C.DispatchKey.PreDispatch)
        self._name, self.failed, self._decides = name, False, decides
        self._ids: dict[int, int] = {}
        self._alive: dict[tuple[str, int], weakref.ref[Any]] = {}  # nothing is kept alive: memory is told by what is
        self._homes: dict[int, int] = {}  # storage -> its number
        self._kept: list[torch.Tensor] = []  # but for constants, so that no id of theirs is used again
        self._memory: dict[int, int] = {}
        self._specs: dict[int, Spec] = {}
        self._sources: list[Source] = []
        self._events: list[Op] = []
        self._guards: list[Guard] = []
        self._constants: dict[tuple[int, int], torch.Tensor] = {}
        self._weights = {
            id(tensor): f"{name}.{path}" for path, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        for path, tensor in leaves(given):
            self._enter(tensor, "given", path)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """The mode, and what comes before the dispatcher."""
        with enable_python_dispatcher(), leaving_watched(self._leaving), _numbers_kept(), self:
            yield

    def program(self, returned: Any, written: Mapping[Path, Any]) -> Program | None:
        """What gives these results: their paths begin with "returned" or "written". None where something came from
        nowhere."""
        results = [(("returned", *path), tensor) for path, tensor in leaves(returned)]
        results += [(("written", *path), tensor) for path, tensor in leaves_at(written)]
        try:
            found = tuple((path, self._refer(tensor)) for path, tensor in results)
        except _UnknownErrorError:
            return None
        if self.failed:
            return None
        made = Program(
            self._name, tuple(self._sources), tuple(self._events), (), tuple(self._guards), self._memory, found,
            self._specs,
        )  # fmt: skip
        return _needed(made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.failed |= any(map(_is_batched, tree_leaves((args, kwargs))))
        if self.failed:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _READS:
            self._leaving(name, args[0])
        if name in _INDEXING and any(map(_is_mask, args[1])):
            self._leaving(name, args[0])
            args = (args[0], _places(args[1]), *args[2:])
        try:
            given = rebuild((args, kwargs), self._refer)
        except _UnknownErrorError:
            self.failed = True
            return func(*args, **kwargs)
        with torch._C._DisablePythonDispatcher():  # below, as without this mode
            fused = fused_attention(func, args, kwargs)
            out = func(*args, **kwargs) if fused is None else fused
        if name in _PLACES and not args[0].is_meta:
            return out  # a constant, which may follow a length
        values = tuple(self._new(tensor) for _, tensor in leaves(out))
        if values:
            on_cpu = _on_cpu(given)
            self._events.append(Op(func, on_cpu[0], on_cpu[1], values, here()))
        return out

    def _leaving(self, name: str, tensor: torch.Tensor) -> None:
        self._decides(tensor)
        self._guards.append(Guard(name, here(), ("given",)))

    def _enter(self, tensor: torch.Tensor, kind: Kind, detail: tuple[Any, ...]) -> int:
        value = self._new(tensor)
        self._sources.append(Source(value, kind, detail, tensor.detach()))
        return value

    def _new(self, tensor: torch.Tensor) -> int:
        value = len(self._memory)
        self._note("value", id(tensor), tensor, self._ids, value)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._homes:
            self._note("home", storage._cdata, storage, self._homes, value)
        self._memory[value] = self._homes[storage._cdata]
        self._specs[value] = tuple(tensor.shape), tensor.dtype
        return value

    def _note(self, kind: str, key: int, what: Any, numbers: dict[int, int], number: int) -> None:
        """numbers[key] is a number for as long as something lives, whose key may be that of something else then."""
        numbers[key] = number

        def end(ended: weakref.ref[Any]) -> None:
            if self._alive.get((kind, key)) is ended:
                del numbers[key], self._alive[kind, key]

        self._alive[kind, key] = weakref.ref(what, end)

    def _refer(self, tensor: Any) -> Any:
        if isinstance(tensor, Ref):
            return tensor
        if (value := self._ids.get(id(tensor))) is not None:
            return Ref(value)
        if (name := self._weights.get(id(tensor))) is not None:
            return Ref(self._enter(tensor, "weight", (name,)))
        if tensor.is_meta and tensor.numel():
            raise _UnknownErrorError
        key = id(tensor), tensor._version
        if key not in self._constants:
            self._kept.append(tensor)
            self._constants[key] = torch.empty_like(tensor, device=CPU) if tensor.is_meta else tensor.detach().clone()
        return self._constants[key]


def _is_batched(value: Any) -> bool:
    """Whether it is a tensor within vmap, of which nothing is told here: it has no memory of its own."""
    return isinstance(value, torch.Tensor) and is_batchedtensor(value)


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool and not index.is_meta


def _places(indices: Any) -> list[Any]:
    """Masks as the places where they are true, which are constants that may follow a length."""
    return [place for index in indices for place in (index.nonzero(as_tuple=True) if _is_mask(index) else (index,))]


def _on_cpu(given: Any) -> Any:
    """(args, kwargs) that name no device but the CPU."""
    args, kwargs = given
    return (
        tuple(CPU if isinstance(arg, torch.device) else arg for arg in args),
        {key: CPU if isinstance(arg, torch.device) else arg for key, arg in kwargs.items()},
    )


@contextlib.contextmanager
def _numbers_kept() -> Iterator[None]:
    """Within it, torch.tensor(numbers, device="meta") begins as a tensor that has them: on meta it would have none, and
    no operator would tell."""
    usual = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "meta":
            return usual(data, device=device, **kwargs)
        made = usual(data, **kwargs)
        return made.to(device) if made.is_floating_point() or made.is_complex() else made

    torch.tensor = tensor
    try:
        yield
    finally:
        torch.tensor = usual
        # torch remembers which functions take the device of a context: if it first asked in here, not this one, and
        # transformers, which asks it whether it is on meta, would leave position ids as the allocator gave them.
        _device_constructors.cache_clear()


def _needed(program: Program) -> Program:
    """The program without events that its results do not need, and without what belongs to those."""
    events = tuple(program.events[place] for place in sorted(program.needed))
    read = {ref.id for event in events for ref in refs((event.args, event.kwargs))}
    read |= {ref.id for ref in refs([value for _, value in program.results])}
    read |= {value for event in events for value in outputs_of(event)}
    sources = tuple(source for source in program.sources if source.kind == "given" or source.id in read)
    read |= {source.id for source in sources}
    return replace(
        program,
        events=events,
        sources=sources,
        memory={value: storage for value, storage in program.memory.items() if value in read},
        specs={value: spec for value, spec in program.specs.items() if value in read},
    )
