"""The law that an integer follows, of the values that it had for texts of several lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from slipcast_compiler.capture.program import Affine, Length

DISTINCT = 3  # lengths of a text: two make a law, and the third checks it
PADDED = 5  # the same for a law that pads: three make it, one tells it from other multiples, and one checks it
MULTIPLES = range(2, 513)
FEW = 8  # times that such a law takes a length, or the padded one


@dataclass(frozen=True)
class Series:
    """A length, and how long the text is in each of the captures."""

    length: Length
    counts: tuple[int, ...]

    def affine(self, values: Sequence[int]) -> Affine | None:
        """scale * length + offset that gives these values; None where there is none, or too few lengths to tell."""
        counts = self.counts
        if len(set(counts)) < DISTINCT:
            return None
        low, high = counts.index(min(counts)), counts.index(max(counts))
        scale = (values[high] - values[low]) // (counts[high] - counts[low])
        return self._checked(Affine(self.length.name, scale, values[low] - scale * counts[low]), values)

    def padded(self, values: Sequence[int], shifts: Iterable[int]) -> Affine | None:
        """The same with a multiple to which length + one of `shifts` is padded. None too where several would do: these
        lengths do not tell them apart, and others would."""
        if len(set(self.counts)) < PADDED:
            return None
        found = []
        for shift in set(shifts):
            for multiple in MULTIPLES:
                ups = [-(-(count + shift) // multiple) for count in self.counts]
                if len(set(ups)) > 1 and (law := self._of_multiple(values, ups, multiple, shift)):
                    found.append(law)
        return found[0] if len(found) == 1 else None

    def _of_multiple(self, values: Sequence[int], ups: Sequence[int], multiple: int, shift: int) -> Affine | None:
        """By three captures that tell the length from the padded one."""
        count, up, value = self.counts[0], ups[0], values[0]
        rows = [(a - count, multiple * (b - up), c - value) for a, b, c in zip(self.counts, ups, values, strict=True)]
        pairs = ((one, other, one[0] * other[1] - one[1] * other[0]) for one, other in combinations(rows[1:], 2))
        one, other, apart = next((pair for pair in pairs if pair[2]), (rows[0], rows[0], 0))
        if not apart:
            return None
        scale = (one[2] * other[1] - one[1] * other[2]) // apart
        padded = (one[0] * other[2] - one[2] * other[0]) // apart
        if not padded or max(abs(scale), abs(padded)) > FEW:
            return None
        offset = value - scale * count - padded * multiple * up
        return self._checked(Affine(self.length.name, scale, offset, padded, multiple, shift), values)

    def _checked(self, law: Affine, values: Sequence[int]) -> Affine | None:
        return law if [law.at({law.length: count}) for count in self.counts] == list(values) else None
