"""The queue of `slipcast serve`: what goes into one call, and what becomes of what cannot be drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from slipcast.errors import Cancelled, RequestError
from slipcast.serve.jobs import BusyError, ClosingError, Drawer, Job


class Pipe:
    """Draws a picture of a prompt and a seed as the two of them, in two steps, once it is let go on."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.manifest = SimpleNamespace(sampling=SimpleNamespace(steps=2))
        self.go, self.begun, self.closed = threading.Event(), threading.Event(), False

    def __call__(self, prompt: list[str], seed: list[int], callback_on_step_end: Any, **arguments: Any) -> Any:
        self.calls.append({"prompt": prompt, "seed": seed, **arguments})
        self.begun.set()
        assert self.go.wait(10)
        for step in range(2):
            callback_on_step_end(self, step, 0.5, {})
        if "bad" in prompt:
            raise RequestError("a bad prompt")
        if "defect" in prompt:
            raise ZeroDivisionError
        return SimpleNamespace(images=list(zip(prompt, seed, strict=True)))

    def close(self) -> None:
        self.closed = True


class Desk:
    """A drawer, and what its jobs came to."""

    def __init__(self, most: int = 8, together: int = 4) -> None:
        self.pipe, self.drawn, self.steps = Pipe(), list[tuple[str, int]](), list[tuple[int, int]]()
        pipes: Any = {"one": self.pipe, "other": self.pipe}
        self.drawer = Drawer(pipes, most, together, lambda model, images, _: self.drawn.append((model, images)))

    def ask(self, prompt: str, *seeds: int, model: str = "one", within: float = 60, **arguments: Any) -> Any:
        ended = threading.Event()
        job = Job(
            model, prompt, seeds, arguments, time.monotonic() + within, lambda _: ended.set(),
            lambda *at: self.steps.append(at),
        )  # fmt: skip
        self.drawer.put(job)
        return SimpleNamespace(job=job, ended=ended)

    def hold(self) -> Any:
        """Busy with something, so that what is asked next waits."""
        asked = self.ask("first", 1)
        assert self.pipe.begun.wait(10)
        return asked

    def finish(self, *asked: Any) -> None:
        self.pipe.go.set()
        for each in asked:
            assert each.ended.wait(10)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.pipe.go.set()
    made.drawer.close()


def test_what_is_alike_goes_into_one_call_and_each_gets_its_own(desk: Desk) -> None:
    first = desk.hold()
    alike = [desk.ask("a", 5), desk.ask("b", 6, 7), desk.ask("c", 8)]
    others = [desk.ask("d", 9, num_inference_steps=3), desk.ask("e", 10, model="other"), desk.ask("f", 11)]
    assert desk.drawer.waiting == 6
    desk.finish(first, *alike, *others)
    assert [call["prompt"] for call in desk.pipe.calls] == [["first"], ["a", "b", "b", "c"], ["d"], ["e"], ["f"]]
    assert [each.job.pictures for each in alike] == [[("a", 5)], [("b", 6), ("b", 7)], [("c", 8)]]
    assert desk.pipe.calls[2]["num_inference_steps"] == 3
    assert desk.drawn == [("one", 1), ("one", 4), ("one", 1), ("other", 1), ("one", 1)]
    assert set(desk.steps) == {(1, 2), (2, 2), (1, 3), (2, 3)}


@pytest.mark.parametrize("bad", ["bad", "defect"])
def test_what_is_refused_spoils_nothing_else(desk: Desk, bad: str) -> None:
    first = desk.hold()
    asked = [desk.ask("a", 5), desk.ask(bad, 6), desk.ask("c", 8)]
    later = desk.ask("later", 1, num_inference_steps=9)
    desk.finish(first, *asked, later)
    assert [each.job.pictures for each in asked] == [[("a", 5)], [], [("c", 8)]]
    assert isinstance(asked[1].job.error, RequestError if bad == "bad" else ZeroDivisionError)
    assert later.job.pictures == [("later", 1)]


def test_what_nobody_waits_for_is_not_drawn(desk: Desk) -> None:
    first = desk.hold()
    gone, late, kept = desk.ask("gone", 1), desk.ask("late", 2, within=0.0), desk.ask("kept", 3)
    gone.job.gone = True
    first.job.gone = True  # while it is being drawn
    desk.finish(first, gone, late, kept)
    assert [call["prompt"] for call in desk.pipe.calls] == [["first"], ["kept"]]
    assert all(isinstance(each.job.error, Cancelled) for each in (first, gone, late))
    assert kept.job.pictures == [("kept", 3)]


def test_a_full_queue_says_when_to_come_again() -> None:
    """Who is gone, or late, takes nobody's place in it."""
    desk = Desk(most=2)
    asked = [desk.hold(), desk.ask("gone", 1), desk.ask("late", 1, within=0.0)]
    asked[1].job.gone = True
    asked += [desk.ask("a", 1), desk.ask("b", 2)]
    assert desk.drawer.waiting == 2 and asked[1].ended.is_set() and asked[2].ended.is_set()
    with pytest.raises(BusyError) as busy:
        desk.ask("c", 3)
    assert busy.value.retry_s >= 1
    desk.finish(*asked)
    desk.drawer.close()


def test_closing_ends_all_that_waits() -> None:
    desk = Desk()
    first, second = desk.hold(), desk.ask("second", 2, num_inference_steps=3)
    closing = threading.Thread(target=desk.drawer.close)
    closing.start()
    assert second.ended.wait(10)  # while the first is still being drawn
    desk.finish(first)
    closing.join(10)
    assert isinstance(first.job.error, Cancelled) and isinstance(second.job.error, Cancelled)
    assert desk.pipe.closed and len(desk.pipe.calls) == 1
    with pytest.raises(ClosingError):
        desk.ask("third", 3)


def test_more_images_than_go_together_take_several_calls(desk: Desk) -> None:
    many = desk.ask("many", *range(10))
    desk.finish(many)
    assert [call["seed"] for call in desk.pipe.calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert many.job.pictures == [("many", seed) for seed in range(10)]
    assert desk.steps == [(step, 6) for step in range(1, 7)]


def test_true_is_not_one(desk: Desk) -> None:
    first = desk.hold()
    asked = [desk.ask("a", 1, num_inference_steps=1), desk.ask("b", 2, num_inference_steps=True)]
    desk.finish(first, *asked)
    assert [call["prompt"] for call in desk.pipe.calls] == [["first"], ["a"], ["b"]]
