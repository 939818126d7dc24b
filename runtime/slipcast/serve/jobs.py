"""Requests in a queue, which one thread draws: those that ask for the same, but for texts and seeds, in one call."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slipcast.errors import Cancelled, RequestError, ResourceError
from slipcast.run.pipeline import Pipeline
from slipcast.run.program import ProgramPipeline

logger = logging.getLogger("slipcast")

Served = Pipeline | ProgramPipeline


class BusyError(ResourceError):
    """The queue is full. `retry_s`: after about how many seconds there may be room."""

    def __init__(self, waiting: int, retry_s: int) -> None:
        super().__init__("the queue is full", got=f"{waiting} requests", hint=f"ask again after {retry_s} seconds")
        self.retry_s = retry_s


class ClosingError(Cancelled):
    """The server is about to end."""


@dataclass(eq=False)
class Job:
    """Pictures of one prompt, image i with seeds[i]. `arguments`: of the call besides, by name; `deadline`: on the
    clock of time.monotonic.

    `tell(step, steps)` is called by the drawing thread after each step, and `end(job)` once, when `pictures` (PIL) or
    `error` is there. Set `gone` when nobody waits any longer.
    """

    model: str
    prompt: str | None
    seeds: tuple[int, ...]
    arguments: Mapping[str, Any]
    deadline: float
    end: Callable[[Job], None]
    tell: Callable[[int, int], None] = lambda step, steps: None
    gone: bool = False
    pictures: list[Any] = field(default_factory=list)
    error: Exception | None = None
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What has to be the same for two to be drawn in one call."""
        given = sorted((name, type(value).__name__, value) for name, value in self.arguments.items())
        return self.model, self.prompt is None, tuple(given)

    @property
    def over(self) -> bool:
        """Whether there is no use in drawing it."""
        return self.gone or time.monotonic() > self.deadline


class Drawer:
    """Draws jobs, in the order in which they came, at most `together` images in a call. `most`: how many may wait.

    `drawn(model, images, seconds)` is told of each call.
    """

    def __init__(
        self, pipes: Mapping[str, Served], most: int, together: int, drawn: Callable[[str, int, float], None]
    ) -> None:
        self._pipes, self._most, self._together, self._drawn = pipes, most, together, drawn
        self._waiting, self._closing, self._pace = deque[Job](), False, 1.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="slipcast-draw", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs nobody has begun."""
        with self._changed:
            return sum(not job.over for job in self._waiting)

    def put(self, job: Job) -> None:
        """Into the queue; BusyError where it is full, ClosingError where nothing is begun any more."""
        with self._changed:
            if self._closing:
                raise ClosingError("the server is closing")
            over = self._take_over()
            full = len(self._waiting) >= self._most
            if not full:
                self._waiting.append(job)
                self._changed.notify()
        self._leave(over)
        if full:
            raise BusyError(self._most, max(1, round(self._pace * (self._most + 1))))

    def stop(self) -> None:
        """What waits is ended without being drawn, and what is being drawn at its next step; nothing is begun."""
        with self._changed:
            self._closing = True
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in left:
            self._end(job, ClosingError("the server is closing"))

    def close(self) -> None:
        """Stop, and free the engines."""
        self.stop()
        self._thread.join()
        for pipe in self._pipes.values():
            pipe.close()

    def _work(self) -> None:
        while True:
            jobs, over = self._next()
            self._leave(over)
            if not jobs:
                return
            self._draw(jobs)

    def _next(self) -> tuple[list[Job], list[Job]]:
        """The first job and those that go into its call, none when closing; and those that are over."""
        with self._changed:
            over = self._take_over()
            while not self._waiting and not self._closing:
                self._changed.wait()
                over += self._take_over()
            if self._closing:
                return [], over
            chosen, left = [self._waiting.popleft()], deque[Job]()
            images = len(chosen[0].seeds)
            for job in self._waiting:
                if job.key == chosen[0].key and images + len(job.seeds) <= self._together:
                    chosen.append(job)
                    images += len(job.seeds)
                else:
                    left.append(job)
            self._waiting = left
            return chosen, over

    def _take_over(self) -> list[Job]:
        """Out of the queue, those that are over; the lock is held."""
        over = [job for job in self._waiting if job.over]
        self._waiting = deque(job for job in self._waiting if job not in over)
        return over

    def _leave(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._end(job, Cancelled("it was not drawn in time"))

    def _draw(self, jobs: list[Job]) -> None:
        """In one call; where that fails, each by itself: it may be the fault of one of them."""
        begin = time.perf_counter()
        try:
            pictures = self._call(self._pipes[jobs[0].model], jobs)
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, Cancelled):
                for job in jobs:
                    self._draw([job])
                return
            if not isinstance(error, RequestError | Cancelled):  # which clients are not told in full
                logger.exception("drawing failed")
            for job in jobs:
                self._end(job, error)
        else:
            seconds = time.perf_counter() - begin
            self._pace = 0.8 * self._pace + 0.2 * seconds / len(jobs)
            for job in jobs:
                job.pictures, pictures = pictures[: len(job.seeds)], pictures[len(job.seeds) :]
                job.seconds = seconds
                self._end(job, None)

    def _call(self, pipe: Served, jobs: list[Job]) -> list[Any]:
        """Their pictures, one after another; a job of more images than go together takes several calls."""
        usual = jobs[0].arguments.get("num_inference_steps")
        seeds = [seed for job in jobs for seed in job.seeds]
        prompts = [job.prompt for job in jobs for _ in job.seeds]
        starts, found = range(0, len(seeds), self._together), list[Any]()
        call: Any = pipe

        def ended(_: Any, step: int, steps: Any, *more: Any) -> None:
            if self._closing:
                raise ClosingError("the server is closing")
            if all(job.over for job in jobs):
                raise Cancelled("nobody waits for it any longer")
            # The other kind of pipeline gives the timestep there, and does not say how many follow.
            total = steps if isinstance(pipe, ProgramPipeline) else usual or pipe.manifest.sampling.steps
            total, before = max(total, step + 1), starts.index(start)
            for job in jobs:
                job.tell(before * total + step + 1, len(starts) * total)

        for start in starts:
            part, begin = seeds[start : start + self._together], time.perf_counter()
            texts: dict[str, Any] = {"prompt": prompts[start : start + self._together]}
            if prompts[0] is None:
                texts = {"num_images_per_prompt": len(part)}
            made = call(**texts, seed=part, callback_on_step_end=ended, **jobs[0].arguments)
            self._drawn(jobs[0].model, len(part), time.perf_counter() - begin)
            found += made.images
        return found

    def _end(self, job: Job, error: Exception | None) -> None:
        job.error = error
        try:
            job.end(job)
        except RuntimeError:  # its event loop is closed: nobody is there
            logger.debug("a client's loop is gone")
