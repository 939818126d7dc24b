"""The parts of a program, for people and programs: what each calls, what it reads, and when it runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from slipcast_compiler.capture.cut import Part
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.labels import kind_of
from slipcast_compiler.capture.loop import DENOISER
from slipcast_compiler.capture.program import Call, Ref
from slipcast_compiler.capture.summary import count_linear, count_parameters

# When a part of a program runs, by the beginning of its name.
WHEN = {
    "conditioning": "once for the same texts, however many pictures",
    "start": "once for a picture",
    "denoiser": "in the loop",
    "update": "in the loop",
    "decoder": "once for a picture",
}
FLOAT_BYTES = 4
READS = {"noise": "noise", "image": "pictures", "prompt": "texts"}  # the latest of these binds a value


def when(part: str) -> str:
    """When a part runs: denoiser_2 when denoiser does."""
    return WHEN.get(part.partition("_")[0], "")


def denoisers_of(variants: Sequence[Found]) -> tuple[str, ...]:
    """The modules that are called in the loop, in the order of their first call, without those inside another."""
    found = dict.fromkeys(
        event.module
        for variant in variants
        for part in variant.cut.parts if kind_of(part.name) == DENOISER
        for event in part.events if isinstance(event, Call)
    )  # fmt: skip
    return tuple(name for name in found if not any(name.startswith(f"{other}.") for other in found))


def describe_parts(variants: Sequence[Found], pipe: Any) -> dict[str, Any]:
    """By name, what a PartRecord says of it: its uses are those of the first variant that has it."""
    found = dict[str, Any]()
    for variant in variants:
        program, loop = variant.program, variant.loop
        plain = {loop.unguided.use.part: len(program.marks)} if loop and loop.unguided else {}
        inside = {loop.use.part: len(program.marks), **plain} if loop else {}
        for part in variant.cut.parts:
            modules = [event.module for event in part.events if isinstance(event, Call)]
            made = {
                "modules": modules,
                "parameters": sum(count_parameters(pipe, module) for module in dict.fromkeys(modules)),
                "linear": sum(count_linear(pipe, module) for module in dict.fromkeys(modules)),
                "operators": len(part.events) - len(modules),
                "tiles": next((use.times for use in variant.cut.uses if use.part == part.name), 1),
                "uses": inside.get(part.name, 0) + sum(use.part == part.name for use in variant.cut.uses),
                "constants": len(part.table),
                "reads": reads_of(part),
            }
            found.setdefault(part.name, made)
    return found


TOGETHER_BYTES = 2**30  # that values of images in one call may take at once, beside weights, in fp32


def live_bytes(variants: Sequence[Found]) -> tuple[int, int]:
    """How many bytes values take at once beside weights, at the most: in the pipeline itself, and in its parts, of two
    images in a denoiser that may take several: both are tried so."""

    def whole(found: Found) -> int:
        """Of the result that tiles are laid into, and of what is made of it then."""
        shapes = (found.program.specs[value.id][0] for _, value in found.program.results if isinstance(value, Ref))
        return sum(2 * FLOAT_BYTES * math.prod(size for size in shape if isinstance(size, int)) for shape in shapes)

    in_pipeline, in_parts = max(found.program.live_bytes for found in variants), 0
    for found in variants:
        live = found.program.live
        for part in found.cut.parts:
            modules = (live.get(event.module, 0) for event in part.events if isinstance(event, Call))
            own = max(modules, default=0) if part.live_bytes is None else part.live_bytes + whole(found)
            if part.name.startswith("denoiser") and 2 * own <= TOGETHER_BYTES:
                own *= 2
                in_pipeline = max(in_pipeline, own)
            in_parts = max(in_parts, own)
    return in_pipeline, in_parts


def render_parts(parts: Mapping[str, Any]) -> list[str]:
    """Lines that say of each part what it calls, when it runs, and what it reads."""
    lines = ["parts, of which each becomes an engine"]
    for name, part in parts.items():
        size = f"{part['parameters'] / 1e6:.1f} M" if part["parameters"] else ""
        uses = f"{part['uses']} times" if part["uses"] > 1 else "once"
        uses += f" in {part['tiles']} tiles" if part["tiles"] > 1 else ""
        calls = ", ".join(f"{module} {times} times" if times > 1 else module for module, times in _counted(part))
        lines.append(f"  {name:<16} {size:>10}  runs {uses}: {calls or 'no module'}, {part['operators']} operators")
        read = [f"{count} of {READS[kind]}" for kind, count in part["reads"].items()]
        read += [f"{part['constants']} constants of the step"] * bool(part["constants"])
        if read:
            lines.append(f"  {'':<27}  reads {', '.join(read)}")
    if mixed := [name for name, part in parts.items() if name.startswith("denoiser") and _mixes(part)]:
        lines.append(
            f"  of {' and '.join(mixed)}, what follows from texts, pictures and constants alone leaves the loop"
        )
    return lines


def _counted(part: dict[str, Any]) -> list[tuple[str, int]]:
    return list(Counter(part["modules"]).items())


def _mixes(part: dict[str, Any]) -> bool:
    return len(part["reads"]) > 1 or bool(part["constants"])


def reads_of(part: Part) -> dict[str, int]:
    """How many of its inputs are bound by noise, by pictures and by texts; the later binds."""
    binding = part.program.binding
    kinds = [next((kind for kind in READS if kind in binding[value]), "") for value in part.inputs]
    return {kind: kinds.count(kind) for kind in READS if kind in kinds}
