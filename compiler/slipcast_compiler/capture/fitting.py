"""The size in which a picture is given, so that the pipeline need not resize it.

A run resizes the pictures that it is given by Lanczos's filter, as pipelines do with PIL's. Where the pipeline would
resize one, it is given in that size from the start, as the runtime will give it; where it takes tensors alone, and
resizes them by torch to other numbers, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipcast_compiler.capture.call import make_call, pictures_of, read_pictures
from slipcast_compiler.capture.program import Op, Program, outputs_of, refs
from slipcast_compiler.capture.record import capture
from slipcast_compiler.host.quiet import quiet

CARRIES = ("aten::cat", "aten::clone", "aten::_to_copy", "aten::unsqueeze", "aten::view", "aten::alias")


def with_pictures(pipe: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is given, with pictures in place of their files, in that size. RecipeError for what is none."""
    read = read_pictures(pipe, given)
    if pictures_of(read).keys() == pictures_of(given).keys():
        return given
    with quiet():
        program = capture(pipe, make_call(pipe, read))
    return read_pictures(pipe, given, fitting(program))


def fitting(program: Program) -> dict[str, tuple[int, int]]:
    """By picture (see pictures_of), the (width, height) that a program resizes it to before all else, if another."""
    carried: dict[int, tuple[str, tuple[int, int]]] = {}
    for source in program.needed_sources:
        if source.kind == "image" and source.value.ndim == 4:
            name, *places = source.detail
            carried[source.id] = f"{name}{''.join(f'[{place}]' for place in places)}", _size(program, source.id)
    found = dict(program.resized)
    for event in program.events:
        read = [ref.id for ref in refs((event.args, event.kwargs))]
        if not isinstance(event, Op) or len(read) != 1 or read[0] not in carried:
            continue
        name, size = carried[read[0]]
        operator, (made, *_) = event.function._schema.name, outputs_of(event)
        if "upsample" in operator:
            if _size(program, made) != size:
                found.setdefault(name, _size(program, made))
        elif operator in CARRIES and _size(program, made) == size:
            carried[made] = name, size
    return found


def _size(program: Program, value: int) -> tuple[int, int]:
    *_, height, width = (0, 0, *(size for size in program.specs[value][0] if isinstance(size, int)))
    return width, height
