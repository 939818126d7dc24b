"""Whether feature caching has a place to cut a denoiser, told by what its components did when they were captured.

The same question that graph/shallow.py asks of the exported graph, before there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.program import Call, Op, Program, Ref, leaves, outputs_of, refs

TOKENS = 77  # in place of a size that follows a text


def check_skips(program: Program, share: float) -> None:
    """RecipeError where no feature crosses with skip connections around it, which leaves at most this share of the
    multiply-adds. Nothing is said of components whose code could not be recorded."""
    mark = program.marks[0]
    late = {mark.sample.id}
    for place, event in enumerate(program.events[: mark.begin]):
        if place not in program.needed or not late.intersection(ref.id for ref in refs((event.args, event.kwargs))):
            continue
        late.update(outputs_of(event))
        if isinstance(event, Call) and event.inside and not _has_skips(event.inside, _given(event, late), share):
            raise RecipeError(
                f"[caching]: {event.module} has no place where one feature crosses, with skip connections around it",
                expected=f"a cut that leaves at most {share:.0%} of its multiply-adds",
                got="none",
                hint="give a larger caching.share, or leave [caching] out: it is for U-Nets",
            )


def _given(call: Call, late: set[int]) -> set[int]:
    """What enters a component of the latent, as values of its own program."""
    assert call.inside
    paths = {path for path, leaf in leaves((call.args, call.kwargs)) if isinstance(leaf, Ref) and leaf.id in late}
    return {source.id for source in call.inside.sources if source.kind == "given" and source.detail in paths}


def _has_skips(inside: Program, given: set[int], share: float) -> bool:
    makers = {value: event for event in inside.events for value in outputs_of(event)}
    costs = {id(event): multiply_adds(event, inside) for event in inside.events}
    wanted = [ref.id for _, ref in inside.results if isinstance(ref, Ref)]
    most, late = share * sum(costs.values()), set(given)
    for event in inside.events:
        if late.intersection(ref.id for ref in refs((event.args, event.kwargs))):
            late.update(outputs_of(event))
    crossing = [value for event in inside.events for value in outputs_of(event) if value in late - set(wanted)]
    return any(_leaves_little(value, wanted, given, makers, costs, most) for value in reversed(crossing))


def _leaves_little(
    crossing: int, wanted: Sequence[int], given: set[int], makers: dict[int, Any], costs: dict[int, int], most: float
) -> bool:
    """Whether what is still needed, where a value is given, costs no more than `most`, and reads the latent."""
    seen, waiting, cost, reads = set[int](), list(wanted), 0, False
    while waiting:
        value = waiting.pop()
        if value == crossing or value in seen:
            continue
        seen.add(value)
        reads |= value in given
        if (event := makers.get(value)) is None or id(event) in seen:
            continue
        seen.update(outputs_of(event))
        if (cost := cost + costs[id(event)]) > most:
            return False
        waiting += [ref.id for ref in refs((event.args, event.kwargs))]
    return reads


def multiply_adds(event: Op | Call, program: Program) -> int:
    """Of an operator, by what it reads and gives."""
    inner = INNER.get(event.function._schema.name.removeprefix("aten::")) if isinstance(event, Op) else None
    if inner is None:
        return 0
    shapes = [_sizes(program, ref) for ref in event.args if isinstance(ref, Ref)]
    return math.prod(_sizes(program, Ref(outputs_of(event)[0]))) * inner(shapes)


def _sizes(program: Program, ref: Ref) -> list[int]:
    return [size if isinstance(size, int) else TOKENS for size in program.specs[ref.id][0]]


# By operator, how many multiply-adds a number of its output takes; of the shapes of what it reads.
INNER: dict[str, Callable[[list[list[int]]], int]] = {
    **dict.fromkeys(("linear", "matmul", "bmm", "mm"), lambda shapes: shapes[0][-1]),
    **dict.fromkeys(("addmm", "baddbmm"), lambda shapes: shapes[1][-1]),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), lambda shapes: math.prod(shapes[1][1:])),
    "scaled_dot_product_attention": lambda shapes: 2 * shapes[1][-2],
}
