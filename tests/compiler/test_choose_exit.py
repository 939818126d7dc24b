"""Thresholds of early exit, from curves that are known."""

from __future__ import annotations

import numpy as np

from slipcast_compiler.schedule.early_exit import choose_threshold

# Of two images with six evaluations: from each to the next, and how far it is from the end.
CHANGES = np.array([[0.9, 0.5, 0.2, 0.08, 0.04], [0.9, 0.6, 0.3, 0.1, 0.02]])
ERRORS = np.array([[0.8, 0.4, 0.1, 0.03, 0.0], [0.9, 0.5, 0.2, 0.05, 0.0]])


def test_the_largest_threshold_that_costs_no_more_than_it_may() -> None:
    found = choose_threshold(CHANGES, ERRORS, 0.05)
    assert found == {"threshold": 0.1, "evaluations": 5.0, "error": (0.03 + 0.05) / 2, "all_evaluations": 6}
    found = choose_threshold(CHANGES, ERRORS, 0.1)
    assert (found["threshold"], found["evaluations"], found["error"]) == (0.2, 4.5, (0.1 + 0.05) / 2)


def test_none_where_nothing_can_be_left_out() -> None:
    found = choose_threshold(CHANGES, ERRORS, 0.01)
    assert found == {"threshold": None, "evaluations": 6.0, "error": 0.0, "all_evaluations": 6}


def test_an_image_that_comes_near_and_leaves_again_costs_what_it_stopped_at() -> None:
    found = choose_threshold(np.array([[0.9, 0.1, 0.5, 0.01]]), np.array([[0.5, 0.4, 0.1, 0.0]]), 0.3)
    assert found["threshold"] is None
