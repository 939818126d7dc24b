"""A program: what a pipeline's call did, as sources, component calls and the glue between them.

Values are numbered. An argument that is a `Ref` is a value that depends on a source; one that is `Affine` is an integer
that follows a length; all others are constants, tensors among them. Events are in the order in which they ran, and
replaying them in that order repeats the call.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

_HOLD_NOTHING = ("slipcast_compiler", "builtins", "torch", "numpy", "PIL", "tokenizers", "types", "functools", "enum")
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
Kind = Literal["prompt", "noise", "image", "weight", "given"]
Path = tuple[Any, ...]  # attributes, keys and places on the way to a leaf


@dataclass(frozen=True)
class Ref:
    """A value of the program."""

    id: int


@dataclass(frozen=True)
class Affine:
    """An integer that follows a length: scale * length + offset; where code pads to a multiple of some number, with
    padded * (length + shift, up to the next multiple of that) besides. `more`: what is added, of another length."""

    length: str
    scale: int
    offset: int
    padded: int = 0
    multiple: int = 1
    shift: int = 0
    more: Affine | None = None

    @property
    def lengths(self) -> frozenset[str]:
        """The names of all that it follows."""
        return frozenset([self.length]) | (self.more.lengths if self.more else frozenset())

    def __str__(self) -> str:
        shifted = f"{self.length}{self.shift:+d}" if self.shift else self.length
        terms = [(self.scale, self.length), (self.padded, f"up({shifted}, {self.multiple})")]
        told = [f"{by:+d}*{what}".replace("+1*", "+").replace("-1*", "-") for by, what in terms if by]
        more = f"+{self.more}".replace("+-", "-") if self.more else ""
        return "".join(told).removeprefix("+") + more + (f"{self.offset:+d}" if self.offset else "")

    def at(self, lengths: Mapping[str, Any]) -> Any:
        """For these lengths, which may be symbols."""
        length = lengths[self.length]
        found = self.scale * length + self.offset
        if self.padded:
            found += self.padded * self.multiple * ((length + self.shift + self.multiple - 1) // self.multiple)
        return found + self.more.at(lengths) if self.more else found


Spec = tuple[tuple[int | Affine, ...], torch.dtype]  # what a value is: its shape and dtype


@dataclass(frozen=True)
class Length:
    """How many tokens a text has, or what else sizes follow, from `minimum` to `maximum`. The tensor `value` tells it:
    by its size in `dim`, which is `scale` * length + `offset`; or, where there is no `dim`, by how many of its entries
    are 1."""

    name: str
    minimum: int
    maximum: int
    value: int
    dim: int | None
    offset: int = 0
    scale: int = 1

    def of(self, tensor: torch.Tensor) -> Any:
        """What a tensor tells: an integer, or a symbol while it is traced."""
        if self.dim is not None:
            return (tensor.shape[self.dim] - self.offset) // self.scale
        found = tensor.sum().item()
        torch._check(found >= self.minimum)
        torch._check(found <= self.maximum)
        return found


def measure(lengths: tuple[Length, ...], values: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    """By name, lengths as these values tell them."""
    return {length.name: length.of(values[length.value]) for length in lengths}


@dataclass(frozen=True)
class Tokenized:
    """What a tokenizer was given: `texts`, a list; and its own settings then, None where it has none."""

    texts: tuple[str, ...]
    special_tokens: bool
    padding: Mapping[str, Any] | None
    truncation: Mapping[str, Any] | None


@dataclass(frozen=True)
class Padding:
    """Of tokens, int64 [1, length], with `fill` to a `multiple`: on the left, or on the right."""

    multiple: int
    fill: int
    left: bool

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens, padded."""
        missing = -tokens.shape[1] % self.multiple
        return torch.nn.functional.pad(tokens, (missing, 0) if self.left else (0, missing), value=self.fill)


@dataclass(frozen=True)
class Source:
    """Where values enter. `detail`: of a prompt, the tokenizer and the field of its output; of noise, the operator and
    the generator; of an image, the pipeline's argument; of a weight, its name; of what a call is given, its path in
    (args, kwargs). `value`: what it was at capture, of
    which the shape and dtype are part of the program. `tokenized`: of a prompt, unless it was none of texts. `padding`:
    of a prompt, after the tokenizer."""

    id: int
    kind: Kind
    detail: tuple[Any, ...]
    value: torch.Tensor
    tokenized: Tokenized | None = None
    padding: Padding | None = None

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """What a tokenizer gave, as this source has it."""
        return self.padding(tokens) if self.padding else tokens


@dataclass(frozen=True)
class Op:
    """One ATen operator of the glue. `outputs`: values, in the order of its tensors. `where`: file and line of the code
    that asked for it."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    where: str = ""


@dataclass(frozen=True)
class Call:
    """A module of a component was called: `module` is its name, such as unet, or vae.decoder. `outputs`: values by path
    in what it returned. `written`: values by path in (args, kwargs), that it put into lists and dicts there. `inside`:
    what it did, whose sources are its arguments by path in (args, kwargs), and its weights; as captured, or by lengths.
    Without one the module's own code says what it does; `recorded` is what it did then, for arguments of these sizes.
    `changed`: the pipeline had changed the module for the time of the call, whose code does something else now."""

    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[tuple[Path, int], ...]
    where: str = ""
    written: tuple[tuple[Path, int], ...] = ()
    inside: Program | None = None
    recorded: Program | None = None
    changed: bool = False


@dataclass(frozen=True)
class Mark:
    """A step of the scheduler: what the model had given, the latent before, and, once it is over, the latent after.

    `begin` and `end` are places among the events: the arithmetic of the step lies between them.
    """

    output: Any
    sample: Any
    result: Any
    begin: int
    end: int


@dataclass(frozen=True)
class Guard:
    """A value that was read into Python, where the program cannot follow it."""

    operator: str
    where: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """`memory`: by value, the storage that it lies in, which views share. `results`: by path in what the pipeline
    returned, a Ref or a constant tensor. `specs`: by value. `sigmas`: noise levels of its scheduler, if it has any.
    `lengths`: that arguments and shapes follow; those of a program as it was captured are numbers. `live`: by
    module, how many bytes its values take at once, beside its weights. `resized`: the (width, height) that PIL resizes
    a picture to, by name, where nothing else is done with it."""

    pipeline: str
    sources: tuple[Source, ...]
    events: tuple[Op | Call, ...]
    marks: tuple[Mark, ...]
    guards: tuple[Guard, ...]
    memory: Mapping[int, int]
    results: tuple[tuple[Path, Any], ...]
    specs: Mapping[int, Spec]
    sigmas: tuple[float, ...] = ()
    lengths: tuple[Length, ...] = ()
    live: Mapping[str, int] = field(default_factory=dict)
    resized: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all that runs, constants included."""
        total = hashlib.sha256()

        def told(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                total.update(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                return str(leaf.dtype), tuple(leaf.shape)
            return leaf

        for event in self.events:
            given = rebuild((event.args, event.kwargs), told)
            total.update(repr((operator_of(event), given, outputs_of(event))).encode())
        return total.hexdigest()

    @property
    def live_bytes(self) -> int:
        """What a component's values take at once, at the most."""
        return max(self.live.values(), default=0)

    @property
    def needed(self) -> frozenset[int]:
        """The places of the events that the results depend on."""
        return self.needed_for([value for _, value in self.results])

    def needed_for(self, wanted: Any) -> frozenset[int]:
        """The places of the events that values depend on, writes into their memory included."""
        values = {ref.id for ref in refs(wanted)}
        storages, found = {self.memory[value] for value in values}, set[int]()
        for place in reversed(range(len(self.events))):
            event = self.events[place]
            given = [ref.id for ref in refs((event.args, event.kwargs))]
            writes = isinstance(event, Op) and event.function._schema.is_mutable
            into = {self.memory[value] for value in given[:1]} if writes else set[int]()
            if values.intersection(outputs_of(event)) or into & storages:
                found.add(place)
                values.update(given)
                storages.update(self.memory[value] for value in given)
        return frozenset(found)

    @property
    def needed_sources(self) -> tuple[Source, ...]:
        """Those that the results depend on: a tokenizer may be asked for its length alone."""
        read = {ref.id for place in self.needed for ref in refs((self.events[place].args, self.events[place].kwargs))}
        read |= {ref.id for ref in refs([value for _, value in self.results])}
        return tuple(source for source in self.sources if source.id in read)

    @property
    def binding(self) -> dict[int, frozenset[Kind]]:
        """By value, the kinds of sources that it depends on."""
        bound: dict[int, frozenset[Kind]] = {source.id: frozenset((source.kind,)) for source in self.sources}
        for event in self.events:
            kinds = frozenset[Kind]().union(*(bound[ref.id] for ref in refs((event.args, event.kwargs))))
            for value in outputs_of(event):
                bound[value] = bound.get(value, frozenset()) | kinds
        return bound


def operator_of(event: Op | Call) -> str:
    """The name of what runs."""
    return str(event.function) if isinstance(event, Op) else event.module


def outputs_of(event: Op | Call) -> tuple[int, ...]:
    """The values that an event gives."""
    return event.outputs if isinstance(event, Op) else tuple(value for _, value in (*event.outputs, *event.written))


def refs(value: Any) -> list[Ref]:
    """All references in a structure of arguments."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Ref)]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Tensors and references in a structure, with their paths: dicts and output classes by key, lists by place, objects
    by attribute."""
    if isinstance(value, torch.Tensor | Ref):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, place))
    elif (held := held_by(value)) is not None:
        for name, inner in held.items():
            yield from leaves(inner, (*path, name))


def leaves_at(values: Mapping[Path, Any]) -> Iterator[tuple[Path, Any]]:
    """The same of values at several paths."""
    for path, value in values.items():
        yield from leaves(value, path)


def rebuild(value: Any, change: Callable[[Any], Any]) -> Any:
    """The structure with every tensor, reference and Affine changed; other leaves, and classes, stay."""
    if isinstance(value, torch.Tensor | Ref | Affine):
        return change(value)
    if isinstance(value, dict):
        made = {key: rebuild(inner, change) for key, inner in value.items()}
        return type(value)(**made) if dataclasses.is_dataclass(value) else made
    if isinstance(value, list | tuple):
        parts = [rebuild(inner, change) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if (held := held_by(value)) is not None:
        made = object.__new__(type(value))
        vars(made).update({name: rebuild(inner, change) for name, inner in held.items()})
        return made
    return value


def held_by(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that may hold tensors, such as a cache of keys and values; None for other values."""
    kind = type(value)
    if kind.__module__.partition(".")[0] in _HOLD_NOTHING or isinstance(value, type | torch.nn.Module):
        return None
    held = getattr(value, "__dict__", None)
    return held if type(held) is dict and kind.__flags__ & _MADE_IN_PYTHON else None


def opened(value: Any) -> Any:
    """Mappings that are no dicts (a tokenizer's output) as dicts."""
    return dict(value.items()) if hasattr(value, "items") and not isinstance(value, dict) else value
