"""Roll a program's loop: what leads from the latent to the model's output has one form at every step, or a few.

From mark to mark, `predict` is compared by its form: operators, modules and integers, without floating-point
constants, which are the step table. Where the form changes there are phases (guidance that ends, a second denoiser).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch

from slipcast.errors import RecipeError
from slipcast_compiler.capture.program import Affine, Call, Op, Program, Ref, held_by, outputs_of, rebuild, refs

FORMS = 4  # of which each is an engine
# What may follow guidance: its numbers stay, but for the sign and for channels that the scheduler does not read.
SAME_NUMBERS = (
    "neg",
    "split",
    "split_with_sizes",
    "squeeze",
    "unsqueeze",
    "stack",
    "slice",
    "select",
    "alias",
    "_to_copy",
)


@dataclass(frozen=True)
class Predict:
    """One step: the places of its events, in order; the latent that it reads; what else it reads of before the loop, in
    the order of use; and its floating-point constants, which `form` leaves out."""

    events: tuple[int, ...]
    latent: int
    given: tuple[int, ...]
    constants: tuple[Any, ...]
    form: tuple[Any, ...]


@dataclass(frozen=True)
class Phase:
    """Steps of one form, from `first` on. `table`: by place among the constants, how many numbers differ from step to
    step. `guidance`: what its last operators compute, if that is guidance. `ending`: what gives the output, a module or
    an operator with its line."""

    first: int
    steps: tuple[Predict, ...]
    table: tuple[int, ...]
    guidance: str | None
    ending: str


@dataclass(frozen=True)
class Loop:
    """`carried`: whether each step's latent is the result of the step before, as it is."""

    phases: tuple[Phase, ...]
    carried: bool


def roll(program: Program) -> Loop | None:
    """The loop; None where the scheduler takes no step, or where a step's output does not come from its latent.

    RecipeError where each step has a form of its own, or where there are more than FORMS of them.
    """
    steps = [predict(program, number) for number in range(len(program.marks))]
    found = [step for step in steps if step and step.events]
    if not steps or len(found) < len(steps):
        return None
    _check_forms(program, found)
    phases, first = [], 0
    for _, group in groupby(found, key=lambda step: step.form):
        alike = tuple(group)
        output = program.marks[first].output.id
        guidance, ending = find_guidance(program, alike[0], output), find_ending(program, alike[0], output)
        phases.append(Phase(first, alike, _differing(alike), guidance, ending))
        first += len(alike)
    return Loop(tuple(phases), all(before.result == after.sample for before, after in pairwise(program.marks)))


def _check_forms(program: Program, steps: Sequence[Predict]) -> None:
    forms: list[Any] = []
    for step in steps:
        if step.form not in forms:
            forms.append(step.form)
    if len(forms) <= FORMS and (len(forms) < len(steps) or len(steps) < 3):
        return
    order = "".join(chr(ord("A") + min(forms.index(step.form), 25)) for step in steps)
    pairs = zip(steps[0].form, steps[1].form, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), -1)
    raise RecipeError(
        f"{program.pipeline}: its steps change their form without a pattern",
        expected=f"steps of one form, or of up to {FORMS} forms that come back",
        got=f"{len(forms)} forms in {len(steps)} steps: {order}; the first two part at "
        f"{program.events[steps[1].events[place]].where}",
        hint="give the call more steps, if a form lasts for some of them; each form is a denoiser of its own",
    )


def predict(program: Program, number: int) -> Predict | None:
    """The events of a step that depend on its latent; what they read besides is given, wherever it was made.

    None where the scheduler is given no value for output or latent.
    """
    mark = program.marks[number]
    if not isinstance(mark.output, Ref) or not isinstance(mark.sample, Ref):
        return None
    before = program.marks[number - 1] if number else None
    latents = {each.id for each in (mark.sample, before and before.result) if isinstance(each, Ref)}
    window = range(before.end if before else 0, mark.begin)
    late = set(latents)
    for place in window:
        event = program.events[place]
        if any(ref.id in late for ref in refs((event.args, event.kwargs))):
            late.update(outputs_of(event))
    made = {value: place for place in window for value in outputs_of(program.events[place])}
    waiting, places = [mark.output.id], set[int]()
    while waiting:
        value = waiting.pop()
        if value in late and value not in latents and (place := made[value]) not in places:
            places.add(place)
            waiting += [ref.id for ref in refs((program.events[place].args, program.events[place].kwargs))]
    return _formed(program, tuple(sorted(places)), mark.sample.id)


def _formed(program: Program, order: tuple[int, ...], latent: int) -> Predict:
    numbers, given, constants, form = {latent: 0}, list[int](), list[Any](), list[Any]()

    def abstract(value: Any) -> Any:
        if isinstance(value, Ref):
            if value.id not in numbers:
                numbers[value.id] = -1 - len(given)  # what is given from before the loop is counted down
                given.append(value.id)
            return "value", numbers[value.id]
        if isinstance(value, Affine):
            return str(value)
        constants.append(value)
        return "tensor", str(value.dtype), tuple(value.shape)

    for place in order:
        event = program.events[place]
        args = _literal(rebuild((event.args, event.kwargs), abstract), constants)
        form.append((str(event.function) if isinstance(event, Op) else event.module, args))
        for value in outputs_of(event):
            numbers[value] = len(numbers)
    return Predict(order, latent, tuple(given), tuple(constants), tuple(form))


def _literal(value: Any, constants: list[Any]) -> Any:
    """Hashable, with floats among the constants."""
    if isinstance(value, float):
        constants.append(value)
        return "float"
    if isinstance(value, dict):
        return tuple((key, _literal(inner, constants)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return tuple(_literal(inner, constants) for inner in value)
    if (held := held_by(value)) is not None:
        return type(value).__name__, _literal(held, constants)
    return value if isinstance(value, int | str | bool | None) else repr(value)


def _differing(steps: Sequence[Predict]) -> tuple[int, ...]:
    """By constant, how many of its numbers are not the same at all steps; those that are, left out."""
    found = []
    for values in zip(*(step.constants for step in steps), strict=True):
        tensors = [torch.as_tensor(value) for value in values]
        changed = torch.zeros(tensors[0].shape, dtype=torch.bool)
        for tensor in tensors[1:]:
            changed |= tensor != tensors[0]
        found += [int(changed.sum())] if changed.any() else []
    return tuple(found)


def find_guidance(program: Program, step: Predict, output: int) -> str | None:
    """Classifier-free guidance at the end of a step, `a + s (b - a)`, whichever branch it starts from; None where the
    output is something else (renormalised, or of the model alone). `u` is the branch that comes first in the batch."""
    made, value = _before_output(program, step, output)

    def operator(value: Any, name: str) -> Op | None:
        event = made.get(value.id) if isinstance(value, Ref) else None
        return event if isinstance(event, Op) and event.function._schema.name == f"aten::{name}" else None

    if not (total := operator(value, "add")):
        return None
    for start, added in (total.args[:2], total.args[1::-1]):
        if not (product := operator(added, "mul")):
            continue
        for difference, scale in (product.args[:2], product.args[1::-1]):
            branches = operator(difference, "sub")
            if branches and start in branches.args[:2] and _is_number(scale):
                return _named(made, branches, start, float(scale))
    return None


def _is_number(value: Any) -> bool:
    """Of each frame of a video it may be another one."""
    return value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, int | float)


def find_ending(program: Program, step: Predict, output: int) -> str:
    """The module whose output the scheduler is given, or the operator, with its line, that comes after it."""
    made, value = _before_output(program, step, output)
    event = made[value.id] if isinstance(value, Ref) and value.id in made else program.events[step.events[-1]]
    return event.module if isinstance(event, Call) else f"{event.function._schema.name} at {event.where}"


def _before_output(program: Program, step: Predict, output: int) -> tuple[dict[int, Op | Call], Any]:
    """The events of a step by their values; and the value that the output has its numbers from."""
    made = {value: program.events[place] for place in step.events for value in outputs_of(program.events[place])}
    value: Any = Ref(output)
    while isinstance(value, Ref) and isinstance(event := made.get(value.id), Op):
        if event.function._schema.name.removeprefix("aten::") not in SAME_NUMBERS:
            break
        value = event.args[0][0] if isinstance(event.args[0], list) and len(event.args[0]) == 1 else event.args[0]
    return made, value


def _named(made: dict[int, Op | Call], branches: Op, start: Any, scale: float) -> str:
    """The branch that guidance pushes away from is u, and the one that it goes to is c."""
    end, away = branches.args[:2]
    return f"{'u' if start == away else 'c'} + {scale:g} (c - u)" if end != away else f"{scale:g}"
