"""Laws that integers follow, of a few lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from slipcast_compiler.capture.laws import Series, find_sums
from slipcast_compiler.capture.program import Affine, Length

COUNTS = (501, 251, 121, 61, 91, 76, 46, 31)
SERIES = Series(Length("length", 2, 501, 0, 1), COUNTS)


@pytest.mark.parametrize(
    ("law", "says"),
    [(lambda n: n + 3, "length+3"), (lambda n: 2 * n, "2*length"), (lambda n: 7 - n, "-length+7")],
)
def test_what_is_affine(law: Callable[[int], int], says: str) -> None:
    assert str(SERIES.affine([law(count) for count in COUNTS])) == says


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@pytest.mark.parametrize(
    ("law", "shifts", "says"),
    [
        (lambda n: _up(n, 8), (0,), "up(length, 8)"),
        (lambda n: _up(n, 32) - n, (0, -20), "-length+up(length, 32)"),
        (lambda n: 2 * _up(n - 20, 32) + 5, (0, -20), "2*up(length-20, 32)+5"),
    ],
)
def test_what_is_padded_to_a_multiple(law: Callable[[int], int], shifts: tuple[int, ...], says: str) -> None:
    values = [law(count) for count in COUNTS]
    found = SERIES.padded(values, shifts)
    assert str(found) == says and found and found.at({"length": 200}) == law(200)
    assert SERIES.affine(values) is None


def test_lengths_that_do_not_tell_two_laws_apart() -> None:
    assert SERIES.padded([_up(count - 3, 32) for count in COUNTS], (0, -3)) is None


def test_other_numbers_have_no_law() -> None:
    squares = [count * count for count in COUNTS]
    assert SERIES.affine(squares) is None and SERIES.padded(squares, (0,)) is None


def test_too_few_lengths_tell_none() -> None:
    two = Series(SERIES.length, (4, 9, 4))
    assert two.affine([4, 9, 4]) is None
    four = Series(SERIES.length, COUNTS[:4])
    assert four.padded([_up(count, 8) for count in COUNTS[:4]], (0,)) is None
    assert Affine("length", 1, 0).at({"length": 4}) == 4


@pytest.mark.parametrize(
    ("law", "says"),
    [
        (lambda m, n: 2 * m + n - 3, "2*length+length_2-3"),
        (lambda m, n: 64 - m - n, "-length-length_2+64"),
        (lambda m, n: _up(m, 32) + _up(n, 32), "up(length, 32)+up(length_2, 32)"),
        (lambda m, n: _up(m, 32) + _up(n, 32) - m - n, "-length+up(length, 32)-length_2+up(length_2, 32)"),
        (lambda m, n: m * n, None),
        (lambda m, n: max(m, n), None),
    ],
)
def test_what_two_lengths_make_together(law: Callable[[int, int], int], says: str | None) -> None:
    others = (3, 70, 99, 51, 50, 5, 40, 33)
    series = SERIES, Series(Length("length_2", 2, 501, 1, 1), others)
    values = [law(*counts) for counts in zip(COUNTS, others, strict=True)]
    found = find_sums(series, values, {"length": {(32, 0)}, "length_2": {(32, 0)}})
    assert [str(each) for each in found] == [says] * (says is not None)
    assert all(each.at({"length": 200, "length_2": 90}) == law(200, 90) for each in found)
    assert all(each.lengths == {"length", "length_2"} for each in found)
    few = [Series(each.length, each.counts[:3]) for each in series]
    assert not find_sums(few, values[:3], {})


def test_lengths_that_go_together_tell_no_sum() -> None:
    series = SERIES, Series(Length("length_2", 2, 501, 1, 1), tuple(count + 2 for count in COUNTS))
    assert not find_sums(series, [3 * count for count in COUNTS], {})
