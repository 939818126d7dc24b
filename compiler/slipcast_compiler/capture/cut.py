"""Cut a program into parts, of which each becomes an engine, and into the order in which they are used.

What depends on prompts and images alone is `conditioning`, evaluated once for them, wherever it ran. What depends on
noise, up to the first step, is `start`. Of each step there is `denoiser`, which leads from the latent to the model's
output, and `update`, the scheduler's arithmetic with all that lies between two steps. The rest is `decoder`. Steps of
one form are uses of one part; constants that differ between them are its table. So are those of several programs: what
a pipeline does for other numbers of steps, or sizes, has parts in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from slipcast.bundle.tiles import Tiling
from slipcast_compiler.capture.labels import check_writes, label_events, last_label, name_of, read_elsewhere
from slipcast_compiler.capture.program import (
    Affine,
    Call,
    Length,
    Op,
    Program,
    Ref,
    held_by,
    measure,
    operator_of,
    outputs_of,
    rebuild,
)
from slipcast_compiler.capture.sizes import Quantity, Shape, Sizes, find_sizes

Event = Op | Call


@dataclass(frozen=True, eq=False)
class Part:
    """`inputs` and `outputs`: values, as its `events` number them, and as they are in `program`. `weights`: values that
    are a component's, by name. `table`: by value, what it is in each row, stacked [rows, ...]: constants that differ
    from use to use. `lengths`: those that its events follow, and what else its sizes do, as its inputs tell them.
    `sizes`: by name, what these are for each size that was captured; where it is for several, `apart` has what it would
    be for that of each program alone. `live_bytes`: what its values take at once; None: as its modules in a program."""

    name: str
    program: Program
    events: tuple[Event, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[tuple[int, str], ...]
    table: tuple[tuple[int, torch.Tensor], ...]
    lengths: tuple[Length, ...]
    sizes: tuple[Mapping[str, int], ...]
    apart: tuple[tuple[Program, Part], ...] = ()
    live_bytes: int | None = None

    @property
    def free(self) -> tuple[Length, ...]:
        """What its sizes follow besides texts."""
        texts = {length.name for length in self.program.lengths}
        return tuple(length for length in self.lengths if length.name not in texts)


@dataclass(frozen=True)
class Use:
    """A part is run: on these values of the program, in the order of its inputs; it gives these, in that of its
    outputs. `row`: of its table; `tiles`: in which it is run, so many `times`."""

    part: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    row: int | None
    tiles: Tiling | None = None
    times: int = 1


@dataclass(frozen=True)
class Cut:
    """Of a program, whose parts may be other programs' too. `steps`: after which use a step is over."""

    parts: tuple[Part, ...]
    uses: tuple[Use, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Piece:
    """Events that run together. `form`: what is the same of two pieces that one engine can run, but for sizes;
    `integers`: of their arguments."""

    name: str
    program: Program
    events: tuple[Event, ...]
    form: tuple[Any, ...]
    values: tuple[int, ...]  # in the order of their first mention
    inputs: tuple[int, ...]  # places among the values
    outputs: frozenset[int]  # places among the values
    constants: tuple[Any, ...]
    integers: tuple[int, ...]

    def shape(self, place: int) -> Shape:
        """Of a value, by its place."""
        return self.program.specs[self.values[place]][0]

    @property
    def sizes(self) -> Any:
        """Hashable: what has to be the same besides, if no dimension is free."""
        return self.integers, tuple(map(_shape, self.constants)), tuple(map(self.shape, self.inputs))


def cut(program: Program) -> Cut:
    """The parts of a program, and their uses. RecipeError where memory is written to across parts."""
    return cut_together([program])[0]


def cut_together(programs: Sequence[Program]) -> tuple[Cut, ...]:
    """The same of several programs: what has one form is one part, whichever of them it is of; so is what has one form
    but for its sizes."""
    divided = [_divide(program) for program in programs]
    families = _families([pieces for pieces, _ in divided])
    names = _names(family[0][0].name for family in families)
    parts, firsts, rows = dict[_Piece, Part](), dict[str, _Piece](), dict[_Piece, int | None]()
    for name, family in zip(names, families, strict=True):
        group = list(chain(*family))
        distinct, of_group = _rows(group)
        parts |= dict.fromkeys(group, _part_of(name, family, distinct))
        firsts[name] = group[0]
        rows |= of_group
    cuts = []
    for pieces, steps in divided:
        own = [parts[piece] for piece in pieces]
        pairs = zip(pieces, own, strict=True)
        uses = tuple(_use(piece, part, firsts[part.name], rows[piece]) for piece, part in pairs)
        cuts.append(Cut(tuple({part.name: part for part in own}.values()), uses, steps))
    return tuple(cuts)


def _families(divided: Sequence[Sequence[_Piece]]) -> list[list[list[_Piece]]]:
    """Pieces that are of one part, by their sizes, in the order of their first use."""
    alike: dict[Any, dict[Any, list[_Piece]]] = {}  # by name and form, and then by sizes
    for piece in chain(*divided):
        alike.setdefault((piece.name, piece.form), {}).setdefault(piece.sizes, []).append(piece)
    families = []
    for (name, _), by_size in alike.items():
        groups = list(by_size.values())
        programs = [program for group in groups for program in {id(piece.program) for piece in group}]
        of_one_size = len(set(programs)) == len(programs)  # each program
        is_one = len(groups) > 1 and of_one_size and _sizes(groups, name)
        families += [groups] if is_one else [[group] for group in groups]
    order = {piece: place for place, piece in enumerate(chain(*divided))}
    return sorted(families, key=lambda family: order[family[0][0]])


def _sizes(family: Sequence[Sequence[_Piece]], name: str) -> Sizes | None:
    """What the sizes of groups follow that have one form; None where constants differ in theirs, or nothing is it."""
    firsts, outputs = [group[0] for group in family], _outputs([*chain(*family)])
    if len({tuple(map(_shape, piece.constants)) for piece in firsts}) > 1:
        return None
    return find_sizes(
        f"{name}_size",
        [piece.integers for piece in firsts],
        [[piece.shape(place) for place in piece.inputs] for piece in firsts],
        [[piece.shape(place) for place in outputs] for piece in firsts],
    )


def part_of(name: str, program: Program, events: Sequence[Event], read: frozenset[int]) -> tuple[Part, Use]:
    """A part of these events of a program, and its only use; `read`: the values that others read of it."""
    piece = _piece(name, program, tuple(events), read)
    part = _part_of(name, [[piece]], [piece])
    return part, _use(piece, part, piece, None)


def _outputs(group: Sequence[_Piece]) -> list[int]:
    """The places of values that any of them hands on."""
    return sorted(frozenset[int]().union(*(piece.outputs for piece in group)))


def _divide(program: Program) -> tuple[list[_Piece], tuple[int, ...]]:
    """The pieces of a program, in order; and after which of them a step is over."""
    labels = label_events(program)
    check_writes(program, labels)
    read = read_elsewhere(program, labels)
    order = sorted(set(labels.values()))
    pieces = []
    for label in order:
        events = tuple(program.events[place] for place in sorted(labels) if labels[place] == label)
        pieces.append(_piece(name_of(label, len(program.marks)), program, events, read))
    return pieces, tuple(place for place, label in enumerate(order) if 1 < label < last_label(program) and label % 2)


def _piece(name: str, program: Program, events: tuple[Event, ...], read: frozenset[int]) -> _Piece:
    numbers: dict[int, int] = {}
    constants, integers, form = list[Any](), list[int](), list[Any]()
    made = {value for event in events for value in outputs_of(event)}

    def number(value: int) -> int:
        return numbers.setdefault(value, len(numbers))

    for event in events:
        form.append((_operator(event), _formed(event, number, constants, integers)))
        for value in outputs_of(event):
            number(value)
    inputs = tuple(place for value, place in numbers.items() if value not in made)
    outputs = frozenset(numbers[value] for value in made & read)
    values, weights = tuple(numbers), _weights(program)
    form += [(weights.get(values[place], ""), _spec(program, values[place])) for place in inputs]
    return _Piece(name, program, events, tuple(form), values, inputs, outputs, tuple(constants), tuple(integers))


def _spec(program: Program, value: int) -> tuple[str, ...]:
    """Of an input, but for its sizes."""
    shape, dtype = program.specs[value]
    return str(dtype), *("size" if isinstance(size, int) else str(size) for size in shape)


def _shape(constant: Any) -> tuple[int, ...]:
    return tuple(getattr(constant, "shape", ()))


def _operator(event: Event) -> str:
    inside = event.inside if isinstance(event, Call) else None
    return f"{operator_of(event)} {inside.digest}" if inside else operator_of(event)


def _formed(event: Event, number: Any, constants: list[Any], integers: list[int]) -> Any:
    """Hashable: the event's arguments, with what may come from a table among the constants, and without integers."""

    def literal(value: Any, tabled: bool) -> Any:
        if isinstance(value, Ref):
            return "value", number(value.id)
        if isinstance(value, torch.Tensor) or (tabled and isinstance(value, float)):
            constants.append(value)
            return "constant", str(getattr(value, "dtype", "float")), len(_shape(value))
        if _is_integer(value):
            integers.append(value)
            return "integer"
        if isinstance(value, dict):
            return tuple((key, literal(inner, tabled)) for key, inner in value.items())
        if isinstance(value, list | tuple):
            return tuple(literal(inner, tabled) for inner in value)
        if (held := held_by(value)) is not None:
            return type(value).__name__, literal(held, tabled)
        return value if isinstance(value, float | str | bool | None) else repr(value)

    tabled = _takes_tensor(event)
    args = tuple(literal(arg, tabled(place)) for place, arg in enumerate(event.args))
    return args, tuple((key, literal(arg, tabled(key))) for key, arg in event.kwargs.items())


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _takes_tensor(event: Event) -> Any:
    """Whether an argument, by place or by name, may be a tensor of no dimension in place of a number."""
    if isinstance(event, Call):
        return lambda _: False
    arguments = event.function._schema.arguments
    known = {each.name: isinstance(each.type, torch.TensorType) for each in arguments}
    names = [each.name for each in arguments]
    return lambda key: known.get(names[key] if isinstance(key, int) else key, False)


def _names(kinds: Iterable[str]) -> list[str]:
    """denoiser, denoiser_2, ...: by the order of their first use."""
    counts: dict[str, int] = {}
    found = []
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
        found.append(kind if counts[kind] == 1 else f"{kind}_{counts[kind]}")
    return found


def _weights(program: Program) -> dict[int, str]:
    return {source.id: str(source.detail[0]) for source in program.sources if source.kind == "weight"}


def _rows(group: Sequence[_Piece]) -> tuple[list[_Piece], dict[_Piece, int | None]]:
    """The pieces that differ in their constants, which are rows of a table; and by piece, its row, if there is one."""
    distinct, rows = list[_Piece](), dict[_Piece, int | None]()
    known: dict[Any, int] = {}
    differing = _differing(group)
    for piece in group:
        key = tuple(_plain(piece.constants[place]) for place in differing)
        if key not in known:
            known[key] = len(distinct)
            distinct.append(piece)
        rows[piece] = known[key] if differing else None
    return distinct, rows


def _part_of(name: str, family: Sequence[Sequence[_Piece]], distinct: Sequence[_Piece]) -> Part:
    """Of pieces by their sizes; `distinct`: those of them that are rows of its table."""
    outputs = _outputs([*chain(*family)])
    if len(family) == 1:
        return _part(name, family[0][0], distinct, outputs, None)
    apart: list[tuple[Program, Part]] = []
    for group in family:
        own = _part(name, group[0], distinct, outputs, None)
        apart += [(program, own) for program in {id(piece.program): piece.program for piece in group}.values()]
    whole = _part(name, family[0][0], distinct, outputs, _sizes(family, name))
    return replace(whole, apart=tuple(apart))


def _part(name: str, first: _Piece, group: Sequence[_Piece], outputs: Sequence[int], sizes: Sizes | None) -> Part:
    """As the first piece has it. `group`: pieces of one form, a row of the table each; `outputs`: places among their
    values."""
    program, weights = _of_any_size(first, outputs, sizes), _weights(first.program)
    tables = {place: -1 - at for at, place in enumerate(_differing(group))}
    count, integers = iter(range(len(first.constants))), iter(sizes.integers if sizes else first.integers)

    def placed(value: Any, tabled: bool) -> Any:
        if isinstance(value, torch.Tensor) or (tabled and isinstance(value, float)):
            place = next(count)
            return Ref(tables[place]) if place in tables else value
        if _is_integer(value):
            return next(integers)
        if isinstance(value, dict):
            return {key: placed(inner, tabled) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            parts = [placed(inner, tabled) for inner in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if (held := held_by(value)) is not None:
            made = object.__new__(type(value))
            vars(made).update(placed(held, tabled))
            return made
        return value

    events = []
    for event in first.events:
        tabled = _takes_tensor(event)
        args = tuple(placed(arg, tabled(place)) for place, arg in enumerate(event.args))
        kwargs = {key: placed(arg, tabled(key)) for key, arg in event.kwargs.items()}
        events.append(replace(event, args=args, kwargs=kwargs))
    inputs = tuple(first.values[place] for place in first.inputs if first.values[place] not in weights)
    lengths = tuple(_told(program, length, inputs) for length in _followed(program, events))
    return Part(
        name,
        program,
        tuple(events),
        (*inputs, *dict.fromkeys(length.value for length in lengths if length.value not in inputs)),
        tuple(first.values[place] for place in outputs),
        tuple(
            (first.values[place], weights[first.values[place]])
            for place in first.inputs
            if first.values[place] in weights
        ),
        tuple((number, _stacked([piece.constants[place] for piece in group])) for place, number in tables.items()),
        (*lengths, *(_length(each, first) for each in (sizes.quantities if sizes else ()))),
        _examples(program, sizes),
    )


def _examples(program: Program, sizes: Sizes | None) -> tuple[dict[str, int], ...]:
    """Of the quantities; lengths of texts are as they were captured."""
    texts = measure(program.lengths, {source.id: source.value for source in program.sources})
    if not sizes:
        return (texts,)
    names = [each.name for each in sizes.quantities]
    counts = zip(*(each.counts for each in sizes.quantities), strict=True)
    return tuple({**texts, **dict(zip(names, each, strict=True))} for each in counts)


def _of_any_size(first: _Piece, outputs: Sequence[int], sizes: Sizes | None) -> Program:
    """The program of a piece, in which the values that it is given, and gives, have the shapes of all sizes."""
    if not sizes:
        return first.program
    shapes = {*zip(first.inputs, sizes.inputs, strict=True), *zip(outputs, sizes.outputs, strict=True)}
    values = {first.values[place]: shape for place, shape in shapes}
    specs = first.program.specs
    return replace(first.program, specs={**specs, **{each: (values[each], specs[each][1]) for each in values}})


def _length(quantity: Quantity, first: _Piece) -> Length:
    value = first.values[first.inputs[quantity.place]]
    ends = min(quantity.counts), max(quantity.counts)
    return Length(quantity.name, *ends, value, quantity.dim, quantity.offset, quantity.scale)


def _followed(program: Program, events: Iterable[Event]) -> list[Length]:
    """The lengths that arguments of these events follow."""
    names = set[str]()

    def note(value: Any) -> Any:
        names.update(value.lengths if isinstance(value, Affine) else [])
        return value

    for event in events:
        rebuild((event.args, event.kwargs), note)
        if isinstance(event, Call) and event.inside:
            names |= {length.name for length in event.inside.lengths}
    return [length for length in program.lengths if length.name in names]


def _told(program: Program, length: Length, inputs: Iterable[int]) -> Length:
    """The length as an input's shape tells it; as the program has it where none does: its source is an input then."""
    for value in inputs:
        for dim, size in enumerate(program.specs[value][0]):
            if isinstance(size, Affine) and size == Affine(length.name, 1, size.offset):
                return replace(length, value=value, dim=dim, offset=size.offset)
    return length


def _use(piece: _Piece, part: Part, first: _Piece, row: int | None) -> Use:
    """The piece as a use of the part, whose values are those of the first piece."""
    place_of = {value: place for place, value in enumerate(first.values)}
    lengths = {length.name: length.value for length in piece.program.lengths}
    names = {length.value: length.name for length in part.program.lengths}
    inputs = tuple(
        piece.values[place_of[value]] if value in place_of else lengths[names[value]] for value in part.inputs
    )
    return Use(part.name, inputs, tuple(piece.values[place_of[value]] for value in part.outputs), row)


def _differing(group: Sequence[_Piece]) -> list[int]:
    """The places of constants that are not the same in all pieces."""
    places = range(len(group[0].constants))
    return [place for place in places if len({_plain(piece.constants[place]) for piece in group}) > 1]


def _plain(value: Any) -> Any:
    """Hashable: a number, or the bytes of a tensor; of those that are compared all have one dtype and one shape."""
    if not isinstance(value, torch.Tensor):
        return float(value).hex()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy().tobytes()


def _stacked(values: Sequence[Any]) -> torch.Tensor:
    """Numbers are float32, as an operator on float32 tensors takes them."""
    return torch.stack([value if isinstance(value, torch.Tensor) else torch.tensor(value) for value in values])
