"""A part for several sizes, as one for each: where it cannot be traced with free dimensions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from slipcast_compiler.capture.cut import Part, Use
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.labels import kind_of


def split(part: Part, variants: Sequence[Found]) -> tuple[Found, ...]:
    """The variants, with parts of their own sizes in place of a part of all."""
    taken = {each.name for found in variants for each in found.cut.parts} - {part.name}
    named: dict[int, Part] = {}
    for _, own in part.apart:
        if id(own) not in named:
            named[id(own)] = replace(own, name=_name(kind_of(part.name), taken))
            taken.add(named[id(own)].name)
    return tuple(_with_own(found, part, named) for found in variants)


def _name(kind: str, taken: Collection[str]) -> str:
    """The first that is free of denoiser, denoiser_2, ..."""
    number = 1
    while (name := kind if number == 1 else f"{kind}_{number}") in taken:
        number += 1
    return name


def _renamed(use: Use, own: Part) -> Use:
    """The use of a part of one size, which takes no other tiles, and none where it is of the whole."""
    tiles = use.tiles.model_copy(update={"smallest": use.tiles.tile}) if use.tiles and use.times > 1 else None
    return replace(use, part=own.name, tiles=tiles)


def _with_own(found: Found, part: Part, named: dict[int, Part]) -> Found:
    if part not in found.cut.parts:
        return found
    own = next(named[id(own)] for program, own in part.apart if program is found.program)
    cut = replace(
        found.cut,
        parts=tuple(own if each is part else each for each in found.cut.parts),
        uses=tuple(_renamed(use, own) if use.part == part.name else use for use in found.cut.uses),
    )
    loop = found.loop
    if loop:
        columns = {own.name if name == part.name else name: each for name, each in loop.columns.items()}
        use = replace(loop.use, part=own.name) if loop.use.part == part.name else loop.use
        plain = loop.unguided
        if plain and plain.use.part == part.name:
            plain = replace(plain, use=replace(plain.use, part=own.name))
        loop = replace(loop, columns=columns, use=use, unguided=plain)
    return replace(found, cut=cut, loop=loop)
