"""Which part of a program an event is of.

Labels are in the order in which parts run: 0 is the conditioning, 1 the start, then two for each step, the denoiser and
the update, and the decoder is the last.
"""

from __future__ import annotations

from slipcast.errors import RecipeError
from slipcast_compiler.capture.program import Call, Op, Program, Ref, outputs_of, refs
from slipcast_compiler.capture.roll import predict

Event = Op | Call


def kind_of(part: str) -> str:
    """What a part is called without its number: that of denoiser_2 is denoiser."""
    return part.partition("_")[0]


def last_label(program: Program) -> int:
    return 2 + 2 * len(program.marks)


def name_of(label: int, steps: int) -> str:
    if label < 2:
        return ("conditioning", "start")[label]
    return "decoder" if label == 2 + 2 * steps else ("denoiser", "update")[label % 2]


def label_events(program: Program) -> dict[int, int]:
    """By place of an event that the results need."""
    binding, needed = program.binding, program.needed
    of_step: dict[int, int] = {}
    for number in range(len(program.marks)):
        if found := predict(program, number):
            of_step |= dict.fromkeys(found.events, 2 + 2 * number)
    made: dict[int, int] = {}
    labels: dict[int, int] = {}
    for place in sorted(needed):
        event = program.events[place]
        if not any("noise" in binding[value] for value in outputs_of(event)):
            label = 0
        elif place in of_step:
            label = of_step[place]
        else:
            before = max((made.get(ref.id, 0) for ref in refs((event.args, event.kwargs))), default=0)
            after_denoiser = 1 < before < last_label(program) and before % 2 == 0
            label = max(_label_of_place(program, place), before + after_denoiser)
        labels[place] = label
        made |= dict.fromkeys(outputs_of(event), label)
    for place in reversed(labels):  # a constant that is written to is of the part that does
        outputs = set(outputs_of(program.events[place]))
        if not any(binding[value] for value in outputs):
            readers = (each for each in labels if outputs & _read(program.events[each]))
            labels[place] = min((labels[each] for each in readers), default=labels[place])
    return labels


def _read(event: Event) -> set[int]:
    return {ref.id for ref in refs((event.args, event.kwargs))}


def _label_of_place(program: Program, place: int) -> int:
    for number, mark in enumerate(program.marks):
        if place < mark.begin:  # what lies between two steps is of the one before
            return 1 + 2 * number
        if place < mark.end:
            return 3 + 2 * number
    return last_label(program)


def check_writes(program: Program, labels: dict[int, int]) -> None:
    """RecipeError where an event writes into memory that another part made, and that is read again."""
    if event := written_across(program, labels):
        raise RecipeError(
            f"{program.pipeline} writes into a tensor that another part of the program holds",
            expected="new tensors, or writes between two calls of the same components",
            got=f"{event.function._schema.name} at {event.where}",
        )


def written_across(program: Program, labels: dict[int, int]) -> Op | None:
    """The first event that does that."""
    homes: dict[int, set[int]] = {}
    for place, label in labels.items():
        for value in outputs_of(program.events[place]):
            homes.setdefault(program.memory[value], set()).add(label)
    sources = {program.memory[source.id] for source in program.needed_sources}
    for place, label in labels.items():
        event = program.events[place]
        if not isinstance(event, Op) or not event.function._schema.is_mutable:
            continue
        for ref in refs(event.args[:1]):
            storage = program.memory[ref.id]
            if storage in sources or homes.get(storage, set()) - {label}:
                return event
    return None


def read_elsewhere(program: Program, labels: dict[int, int]) -> frozenset[int]:
    """Values that another part than their own reads, or that are results."""
    home = {value: label for place, label in labels.items() for value in outputs_of(program.events[place])}
    found = {value.id for _, value in program.results if isinstance(value, Ref)}
    for place, label in labels.items():
        event = program.events[place]
        found |= {ref.id for ref in refs((event.args, event.kwargs)) if home.get(ref.id) != label}
    return frozenset(found)
