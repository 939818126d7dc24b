"""Is a program the pipeline? It is run again on other prompts and seeds, against the pipeline itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slipcast_compiler.capture.generalise import without_insides
from slipcast_compiler.capture.processing import call_pipeline
from slipcast_compiler.capture.program import Affine, Op, Program, Ref, leaves, measure, opened, outputs_of
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.replay import Values, modules_of, replay, run
from slipcast_compiler.capture.stand_ins import standing_in
from slipcast_compiler.capture.unguided import Plain

LIMIT = 1e-4  # of the relative L2 error of a result


@dataclass(frozen=True)
class Verdict:
    """`error`: of the worst result, relative L2; None where the program of the other call has other sources, or sizes.
    `difference`: what is the first to differ, and where in the pipeline's code, if it is not the same."""

    error: float | None
    difference: str | None

    @property
    def holds(self) -> bool:
        """Whether the program gave what the pipeline gives."""
        return self.error is not None and self.error <= LIMIT


def verify(
    program: Program, pipe: Any, call: Mapping[str, Any], again: Mapping[str, Any], *, light: bool = False
) -> Verdict:  # fmt: skip
    """Compare the program with pipe(**call), for a prompt and seed that were not captured.

    The pipeline has its weights. `again` is the same call, with a generator of its own. `light`: functions take the
    places of its modules, see stand_ins.
    """
    with _seeded():
        other = without_insides(capture(pipe, call)) if light else capture(pipe, call)
    if mismatch := compare_sources(program, other):
        return Verdict(None, mismatch)
    sources = zip(program.needed_sources, other.needed_sources, strict=True)
    values = {mine.id: mine.padded(theirs.value) for mine, theirs in sources}
    components = modules_of(pipe)
    with standing_in(program, components) if light else contextlib.nullcontext():
        try:
            found = replay(program, values, components)
        except (RuntimeError, IndexError) as refused:  # of operators, for sizes that do not go together
            return Verdict(None, f"it has other sizes for another prompt: {str(refused).strip().splitlines()[0]}")
        with torch.no_grad(), _seeded():
            wanted = dict(leaves(opened(call_pipeline(pipe, again))))
        error = max(relative_error(found[path], tensor) for path, tensor in wanted.items())
        difference = None if error <= LIMIT else first_difference(program, other, components)
    return Verdict(error, difference)


def compare_given(
    guided: Program, plain: Plain, pipe: Any, call: Mapping[str, Any], without: Mapping[str, Any], *,
    light: bool = False,
) -> float:  # fmt: skip
    """How far what the model is given without guidance, by the program with it, is from what pipe(**without) gives it:
    the relative L2 error of the worst. `call`: the same with guidance; each has a generator of its own."""
    of = [plain.halves[value][0] if value in plain.halves else value for value in plain.use.inputs]
    found = _values(guided, of, pipe, call, light)
    wanted = _values(plain.program, plain.given, pipe, without, light)
    errors = []
    for value, mine, theirs in zip(plain.use.inputs, found, wanted, strict=True):
        if value in plain.halves:
            mine = mine.chunk(2)[plain.halves[value][1]]
        errors.append(relative_error(mine, theirs))
    return max(errors)


def _values(
    program: Program, wanted: Sequence[int], pipe: Any, call: Mapping[str, Any], light: bool
) -> list[torch.Tensor]:
    """Values of a program, for another call."""
    with _seeded():
        other = without_insides(capture(pipe, call))
    if mismatch := compare_sources(program, other):
        raise ValueError(mismatch)  # the program itself was verified
    sources = zip(program.needed_sources, other.needed_sources, strict=True)
    values: Values = {mine.id: mine.padded(theirs.value) for mine, theirs in sources}
    components = modules_of(pipe)
    lengths = measure(program.lengths, values)
    with standing_in(program, components) if light else contextlib.nullcontext(), torch.no_grad():
        for place in sorted(program.needed_for([Ref(value) for value in wanted])):
            run(program.events[place], values, components, lengths)
    return [values[value] for value in wanted]


def compare_sources(program: Program, other: Program) -> str | None:
    """Why the sources of two captures do not fit together; None where they do."""
    for mine, theirs in zip(program.needed_sources, other.needed_sources, strict=False):
        if mine.kind != theirs.kind or not _fits(program.specs[mine.id][0], theirs.value.shape):
            return (
                f"source {mine.id}, {mine.kind} {mine.detail}, is {list(mine.value.shape)} for one prompt and "
                f"{theirs.kind} {list(theirs.value.shape)} for another"
            )
    counts = len(program.needed_sources), len(other.needed_sources)
    return None if counts[0] == counts[1] else f"{counts[0]} sources for one prompt, {counts[1]} for another"


def _fits(shape: tuple[int | Affine, ...], found: tuple[int, ...]) -> bool:
    pairs = zip(shape, found, strict=False)
    return len(shape) == len(found) and all(isinstance(size, Affine) or size == other for size, other in pairs)


def first_difference(program: Program, other: Program, components: Mapping[str, nn.Module]) -> str:
    """The first event of which the program makes something else than the other call's own program does."""
    pairs = zip(program.needed_sources, other.needed_sources, strict=True)
    mine: Values = {a.id: a.padded(b.value.clone()) for a, b in pairs}
    theirs: Values = {source.id: source.value.clone() for source in other.needed_sources}
    with torch.no_grad():
        lengths = measure(program.lengths, mine)
        events = (tuple(each.events[place] for place in sorted(each.needed)) for each in (program, other))
        for a, b in zip(*events, strict=False):
            name = a.function._schema.name if isinstance(a, Op) else a.module
            if type(a) is not type(b) or len(outputs_of(a)) != len(outputs_of(b)):
                return f"{name} at {a.where or 'an unknown place'}: another operator for another prompt"
            run(a, mine, components, lengths)
            run(b, theirs, components, {})
            for value, wanted in zip(outputs_of(a), outputs_of(b), strict=True):
                if not torch.equal(mine[value], theirs[wanted]):
                    return f"{name} at {a.where or 'an unknown place'}"
    return "an event that only one of the two has"


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|; infinite where the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / size if size else float(found.abs().max())


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Draws without a generator are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
