"""The law that an integer follows, of the values that it had for texts of several lengths."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

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


def find_sums(
    series: Sequence[Series], values: Sequence[int], multiples: Mapping[str, Collection[tuple[int, int]]]
) -> list[Affine]:
    """The laws of two lengths that give these values, of as few terms as can be: of texts that code puts one after the
    other. `multiples`: to which lengths were seen to be padded, with their shifts."""
    for one, other in combinations(series, 2):
        for padded in (False, True):
            terms = [_terms(each, multiples.get(each.length.name, ()), padded) for each in (one, other)]
            found = [law for mine, its in product(*terms) if (law := _sum((one, other), (mine, its), values))]
            if found:
                return found
    return []


@dataclass(frozen=True)
class _Term:
    """A length by itself, padded, or both."""

    plain: bool
    multiple: int = 0
    shift: int = 0

    def columns(self, counts: Sequence[int]) -> list[list[int]]:
        ups = [self.multiple * -(-(each + self.shift) // self.multiple) for each in counts] if self.multiple else []
        return [each for each in ([*counts] if self.plain else [], ups) if each]

    def law(self, name: str, factors: list[int]) -> Affine:
        scale = factors.pop(0) if self.plain else 0
        padded = factors.pop(0) if self.multiple else 0
        return Affine(name, scale, 0, padded, self.multiple or 1, self.shift)


def _terms(series: Series, multiples: Iterable[tuple[int, int]], padded: bool) -> list[_Term]:
    """Of one column, or with what is `padded` besides."""
    both = [_Term(True, *each) for each in multiples]
    return both if padded else [_Term(True), *(_Term(False, *each) for each in multiples)]


def _sum(series: tuple[Series, Series], terms: tuple[_Term, _Term], values: Sequence[int]) -> Affine | None:
    """The law of these terms, where the captures tell it, and one more checks it."""
    columns = [column for each, term in zip(series, terms, strict=True) for column in term.columns(each.counts)]
    table = np.array([*columns, [1] * len(values)], dtype=np.float64).T
    if len({*zip(*columns, strict=True)}) <= table.shape[1] or np.linalg.matrix_rank(table) < table.shape[1]:
        return None
    *factors, offset = np.linalg.lstsq(table, np.array(values, dtype=np.float64))[0].round().astype(int).tolist()
    if max(map(abs, factors)) > FEW:
        return None
    one, other = (term.law(each.length.name, factors) for each, term in zip(series, terms, strict=True))
    law = replace(one, offset=offset, more=other)
    counts = zip(*(each.counts for each in series), strict=True)
    names = [each.length.name for each in series]
    return law if [law.at(dict(zip(names, each, strict=True))) for each in counts] == list(values) else None
