"""For which texts a program is: programs of captures compared, and ranges of lengths that grow, or are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from slipcast.errors import RecipeError
from slipcast_compiler.capture.program import Affine, Call, Length, Program, operator_of, outputs_of, refs

LONGEST = 1 << 20  # tokens


def form_of(program: Program) -> tuple[str, ...]:
    """What runs, in its order, inside of calls too."""
    found = list[str]()
    for place in sorted(program.needed):
        event = program.events[place]
        found.append(operator_of(event))
        if isinstance(event, Call) and event.inside:
            found += form_of(event.inside)
    return tuple(found)


def wiring_of(program: Program) -> tuple[tuple[int, ...], ...]:
    """Of what runs, in its order, what reads what: values are numbered as they are made."""
    numbers = {source.id: number for number, source in enumerate(program.needed_sources)}
    found = list[tuple[int, ...]]()
    for place in sorted(program.needed):
        event = program.events[place]
        found.append(tuple(numbers.get(ref.id, -1) for ref in refs((event.args, event.kwargs))))
        numbers |= {value: len(numbers) + at for at, value in enumerate(outputs_of(event))}
    return tuple(found)


def is_within(program: Program, other: Program) -> bool:
    """Whether another program runs the operators of this one, in their order, and perhaps more between them."""
    form = iter(form_of(other))
    return all(operator in form for operator in form_of(program))


def extend(program: Program, others: Sequence[Program]) -> Program:
    """A program that follows lengths, for the texts of other captures as well. RecipeError where it has none."""
    lengths = []
    for length in program.lengths:
        counts = [count_of(program, length, other) for other in others] + [length.minimum, length.maximum]
        lengths.append(replace(length, minimum=min(counts), maximum=max(counts)))
    made = checked(replace(program, lengths=tuple(lengths)))
    for other in others:
        counts_there = {length.name: count_of(program, length, other) for length in program.lengths}
        given = zip(*(_given_to_calls(each, counts_there) for each in (program, other)), strict=False)
        if unlike := next((pair for pair in given if pair[0] != pair[1]), None):
            raise RecipeError(
                f"{program.pipeline}: the length of a prompt decides what the pipeline does",
                expected=f"{unlike[0]}", got=f"{unlike[1]} for texts of {counts_there}",
            )  # fmt: skip
    return made


def _given_to_calls(program: Program, lengths: Mapping[str, int]) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """The modules that it calls, and the shapes of what these are given, for texts of some lengths."""
    for place in sorted(program.needed):
        event = program.events[place]
        if isinstance(event, Call):
            shapes = [program.specs[ref.id][0] for ref in refs((event.args, event.kwargs))]
            sizes = (tuple(size.at(lengths) if isinstance(size, Affine) else size for size in each) for each in shapes)
            yield event.module, tuple(sizes)


def checked(program: Program) -> Program:
    """The program; RecipeError where texts of its lengths would make a size negative: what is done for these is another
    thing then, and was not captured."""
    ends = product(*({length.minimum, length.maximum} for length in program.lengths))
    counts = [dict(zip((length.name for length in program.lengths), each, strict=True)) for each in ends]
    for size in _sizes(program):
        if below := next((each for each in counts if size.at(each) < 0), None):
            raise RecipeError(
                f"{program.pipeline}: the length of a prompt decides what the pipeline does",
                expected="sizes of at least 0",
                got=f"{size} with {', '.join(f'{name} {count}' for name, count in below.items())}",
                hint="an argument of the pipeline may pad its prompts to one length",
            )
    return program


def without_small_sizes(program: Program) -> Program:
    """A program of one length, for texts so long that no size is 0 or 1, with which a tracer does something else."""
    (length,) = program.lengths
    sizes = list(_sizes(program))
    long = (n for n in range(length.minimum, length.maximum) if all(size.at({length.name: n}) > 1 for size in sizes))
    return replace(program, lengths=(replace(length, minimum=next(long, length.minimum)),))


def _sizes(program: Program) -> Iterator[Affine]:
    """Of its values that follow a length, inside of calls too."""
    for shape, _ in program.specs.values():
        yield from (size for size in shape if isinstance(size, Affine))
    for event in program.events:
        if isinstance(event, Call) and event.inside:
            yield from _sizes(event.inside)


def count_of(program: Program, length: Length, other: Program) -> int:
    """How long a length of the program is in another capture, which has the same sources."""
    place = [source.id for source in program.needed_sources].index(length.value)
    own, value = program.needed_sources[place], other.needed_sources[place].value
    return int(replace(length, minimum=0, maximum=LONGEST).of(own.padded(value)))
