"""A captured pipeline's calibration images, drawn event by event.

What its denoisers do at every step is seen there, and points of the trajectories are kept, at which what the scheduler
is given can be computed again.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slipcast.errors import CheckFailed, NumericalError
from slipcast_compiler.capture.program import Call, Op, Program, Ref, outputs_of, refs
from slipcast_compiler.capture.replay import run
from slipcast_compiler.capture.verify import LIMIT, relative_error

Components = Mapping[str, nn.Module]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A step of a program, up to what its scheduler is given: guidance and all that follows the denoiser's calls are
    part of it. `events`: from the first call of a denoiser on; `output`: the value that they lead to; `modules`: the
    denoisers that are called."""

    number: int
    events: tuple[Op | Call, ...]
    first: int  # the place of the first of them
    output: int
    modules: frozenset[str]

    @property
    def components(self) -> set[str]:
        """Those of the pipeline that are called."""
        return {event.module.partition(".")[0] for event in self.events if isinstance(event, Call)}


@dataclass(frozen=True, eq=False)
class State:
    """A point of a trajectory: an evaluation, the values that it reads, and what it gave."""

    evaluation: Evaluation
    given: Mapping[int, torch.Tensor]
    found: torch.Tensor

    def predict(self, components: Components) -> torch.Tensor:
        """What the scheduler is given, with the modules as they are now."""
        values = copy.deepcopy(dict(self.given))  # events may write; views keep what they are views of
        for event in self.evaluation.events:
            run(event, values, components, {})
        return values[self.evaluation.output]

    def check(self, components: Components) -> None:
        """CheckFailed where it does not come out as it did."""
        with torch.no_grad():
            error = relative_error(self.predict(components), self.found)
        if error > LIMIT:
            raise CheckFailed(
                f"step {self.evaluation.number + 1} of a calibration prompt cannot be computed again by itself",
                expected=f"a relative error of {LIMIT:g}",
                got=error,
                hint='criterion = "magnitude", correct = false and no passes.recover ask for none',
            )


def evaluations_of(program: Program, denoisers: Collection[str]) -> list[Evaluation]:
    """Those that call one of these modules, in order."""
    found, begin = list[Evaluation](), 0
    for number, mark in enumerate(program.marks):
        window = range(begin, mark.begin)
        begin = mark.end
        calls = {place: name for place in window for name in _called(program.events[place], denoisers)}
        if not calls or not isinstance(mark.output, Ref):
            continue
        first, needed = min(calls), program.needed_for([mark.output])
        places = [place for place in window if place >= first and place in needed]
        events = tuple(program.events[place] for place in places)
        modules = frozenset(name for place, name in calls.items() if place in needed)
        found.append(Evaluation(number, events, first, mark.output.id, modules))
    return found


def _called(event: Op | Call, denoisers: Collection[str]) -> list[str]:
    """The denoiser that an event calls, or calls a part of."""
    name = event.module if isinstance(event, Call) else ""
    return [each for each in denoisers if name == each or name.startswith(f"{each}.")]


def draw(
    program: Program, components: Components, evaluations: Sequence[Evaluation], wanted: Collection[Evaluation],
    advance: Callable[[], None],
) -> list[State]:  # fmt: skip
    """Run a program as it was captured, up to its last evaluation; returns the states of those that are wanted.

    `advance` is called after each evaluation. NumericalError where one gives NaN or infinity.
    """
    values, kept = _sources(program, components), list[State]()
    keep, given = {each.first: each for each in wanted}, dict[int, dict[int, torch.Tensor]]()
    before: Mapping[int, torch.Tensor] = {}
    ends = {program.marks[each.number].begin: each for each in evaluations}
    needed = program.needed_for([Ref(each.output) for each in evaluations])
    last = _last_reads(program, needed, evaluations)
    with torch.no_grad():
        for place in range(max(ends) + 1):
            if place in ends:
                evaluation, found = ends[place], _finite(ends[place], values)
                if evaluation.number in given:
                    kept.append(State(evaluation, given.pop(evaluation.number), found.clone()))
                advance()
            if place in keep:
                before = given[keep[place].number] = _inputs(keep[place], values, before)
            if place in needed:
                run(program.events[place], values, components, {})
            for value in last.get(place, ()):
                values.pop(value, None)
    return kept


def _sources(program: Program, components: Components) -> dict[int, torch.Tensor]:
    values: dict[int, torch.Tensor] = {}
    for source in program.sources:
        if source.kind == "weight":
            component, _, path = str(source.detail[0]).partition(".")
            module, _, own = path.rpartition(".")
            values[source.id] = getattr(components[component].get_submodule(module), own).detach()
        else:
            values[source.id] = source.value.clone()
    return values


def _inputs(
    evaluation: Evaluation, values: Mapping[int, torch.Tensor], before: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Copies of what an evaluation reads. What is as it was `before`, such as a prompt's embeddings, is in memory once;
    not where values share their memory, which has to be the same for all that are views of it."""
    made = {value for event in evaluation.events for value in outputs_of(event)}
    read = {ref.id for event in evaluation.events for ref in refs((event.args, event.kwargs))}
    found = copy.deepcopy({value: values[value] for value in sorted(read - made)})
    users = Counter(each.untyped_storage().data_ptr() for each in found.values())
    for value, each in found.items():
        if users[each.untyped_storage().data_ptr()] == 1 and value in before and torch.equal(before[value], each):
            found[value] = before[value]
    return found


def _last_reads(program: Program, needed: Collection[int], evaluations: Sequence[Evaluation]) -> dict[int, list[int]]:
    """By place of an event, the values that nothing reads after it."""
    last: dict[int, int] = {}
    for place in sorted(needed):
        event = program.events[place]
        mentioned = [*outputs_of(event), *(ref.id for ref in refs((event.args, event.kwargs)))]
        last |= dict.fromkeys(mentioned, place)
    for each in evaluations:  # which are looked at when the scheduler is given them
        last[each.output] = max(last.get(each.output, 0), program.marks[each.number].begin)
    found: dict[int, list[int]] = {}
    for value, place in last.items():
        found.setdefault(place, []).append(value)
    return found


def _finite(evaluation: Evaluation, values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    found = values[evaluation.output]
    if not torch.isfinite(found).all():
        raise NumericalError(
            f"{', '.join(sorted(evaluation.modules))}: NaN or infinity in what the scheduler is given",
            expected="finite numbers",
            got=f"at step {evaluation.number + 1} of a calibration prompt",
            hint="the checkpoint's weights or its scheduler are not what the model was trained with",
        )
    return found
