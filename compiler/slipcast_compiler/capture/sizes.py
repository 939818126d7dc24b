"""One part for several sizes: what differs between what a pipeline does for them, if it is integers alone.

Sizes of inputs that differ are quantities, few of them, which an engine's inputs tell; all other integers that differ
have to be affine in one. That is asked of the sizes that were captured, and others are not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slipcast_compiler.capture.program import Affine

Integer = int | Affine  # one that follows the length of a text is the same for all sizes
Shape = tuple[Integer, ...]


@dataclass(frozen=True)
class Quantity:
    """`counts`: what it is for each size. The input in `place` tells it: its dimension `dim` is
    scale * count + offset."""

    name: str
    counts: tuple[int, ...]
    place: int
    dim: int
    scale: int
    offset: int


@dataclass(frozen=True)
class Sizes:
    """`integers`, `inputs`, `outputs`: what they are for all sizes."""

    quantities: tuple[Quantity, ...]
    integers: tuple[Integer, ...]
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


class _ApartError(Exception):
    """Something follows no quantity."""


def find_sizes(
    name: str,
    integers: Sequence[Sequence[Integer]],
    inputs: Sequence[Sequence[Shape]],
    outputs: Sequence[Sequence[Shape]],
) -> Sizes | None:
    """What integers and shapes follow, given for each size, in the same order; None where they do not. Quantities are
    called `name`, and `name` with a number."""
    found = list[Quantity]()
    for place, shapes in enumerate(zip(*inputs, strict=True)):
        for dim, values in enumerate(zip(*shapes, strict=True)):
            sizes = [value for value in values if isinstance(value, int)]
            if len(set(values)) > 1 and len(sizes) == len(values) and _law(found, sizes) is None:
                found.append(_quantity(f"{name}_{len(found) + 1}" if found else name, sizes, place, dim))
    if not found:
        return None
    try:
        return Sizes(
            tuple(found),
            tuple(_follow(found, values) for values in zip(*integers, strict=True)),
            *(
                tuple(
                    tuple(_follow(found, values) for values in zip(*shapes, strict=True))
                    for shapes in zip(*each, strict=True)
                )
                for each in (inputs, outputs)
            ),
        )
    except _ApartError:
        return None


def _quantity(name: str, sizes: Sequence[int], place: int, dim: int) -> Quantity:
    """As few as can be, so that what an engine divides by is a factor of the size, and is seen to be."""
    least = min(sizes)
    scale = math.gcd(*(size - least for size in sizes))
    begin = max(least // scale, 1)
    counts = tuple((size - least) // scale + begin for size in sizes)
    return Quantity(name, counts, place, dim, scale, least - scale * begin)


def _follow(quantities: Sequence[Quantity], values: Sequence[Integer]) -> Integer:
    if len(set(values)) == 1:
        return values[0]
    sizes = [value for value in values if isinstance(value, int)]
    law = _law(quantities, sizes) if len(sizes) == len(values) else None
    if law is None:
        raise _ApartError
    return law


def _law(quantities: Sequence[Quantity], values: Sequence[int]) -> Affine | None:
    """That gives these values; without an offset, if one does."""
    laws = [law for quantity in quantities if (law := _affine(quantity, values))]
    return min(laws, key=lambda law: law.offset != 0, default=None)


def _affine(quantity: Quantity, values: Sequence[int]) -> Affine | None:
    counts = quantity.counts
    low, high = counts.index(min(counts)), counts.index(max(counts))
    scale = (values[high] - values[low]) // (counts[high] - counts[low])
    law = Affine(quantity.name, scale, values[low] - scale * counts[low])
    return law if [law.at({law.length: count}) for count in counts] == list(values) else None
