"""Requests in a queue, which one thread draws: those that ask for the same, but for texts and seeds, in one call.

A picture is the same whatever else is in its call (see PipelineOutput.seeds), so nobody's depends on who else asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slipcast.errors import Cancelled, ResourceError, SlipcastError
from slipcast.run.pipeline import Pipeline
from slipcast.run.program import ProgramPipeline

logger = logging.getLogger("slipcast")

Served = Pipeline | ProgramPipeline


class BusyError(ResourceError):
    """The queue is full. `retry_s`: after about how many seconds there may be room."""

    def __init__(self, waiting: int, retry_s: int) -> None:
        super().__init__("the queue is full", got=f"{waiting} requests", hint=f"ask again after {retry_s} seconds")
        self.retry_s = retry_s


@dataclass
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
        return self.model, self.prompt is None, tuple(sorted(self.arguments.items()))

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
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Into the queue; BusyError where it is full."""
        with self._changed:
            if len(self._waiting) >= self._most or self._closing:
                raise BusyError(len(self._waiting), max(1, round(self._pace * (len(self._waiting) + 1))))
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """What is being drawn is stopped at its next step, and what waits is ended without being drawn."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        for job in self._waiting:
            self._end(job, Cancelled("the server is closing"))
        for pipe in self._pipes.values():
            pipe.close()

    def _work(self) -> None:
        while jobs := self._next():
            alive = [job for job in jobs if not job.over]
            for job in jobs:
                if job not in alive:
                    self._end(job, Cancelled("it was not drawn in time"))
            if alive:
                self._draw(alive)

    def _next(self) -> list[Job]:
        """The first job, and those that go into its call; none when closing."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return []
            chosen, left, images = [self._waiting.popleft()], deque[Job](), 0
            images = len(chosen[0].seeds)
            for job in self._waiting:
                if job.key == chosen[0].key and images + len(job.seeds) <= self._together:
                    chosen.append(job)
                    images += len(job.seeds)
                else:
                    left.append(job)
            self._waiting = left
            return chosen

    def _draw(self, jobs: list[Job]) -> None:
        """In one call; where that fails, each by itself: it may be the fault of one of them."""
        begin, pipe = time.perf_counter(), self._pipes[jobs[0].model]
        try:
            pictures = self._call(pipe, jobs)
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, Cancelled):
                for job in jobs:
                    self._draw([job])
                return
            if not isinstance(error, SlipcastError):  # a defect is this request's, and not the next one's
                logger.exception("drawing failed")
            for job in jobs:
                self._end(job, error)
        else:
            seconds, images = time.perf_counter() - begin, len(pictures)
            self._pace = 0.8 * self._pace + 0.2 * seconds / len(jobs)
            self._drawn(jobs[0].model, images, seconds)
            for job in jobs:
                job.pictures, pictures = pictures[: len(job.seeds)], pictures[len(job.seeds) :]
                job.seconds = seconds
                self._end(job, None)

    def _call(self, pipe: Served, jobs: list[Job]) -> list[Any]:
        usual = jobs[0].arguments.get("num_inference_steps")

        def ended(_: Any, step: int, steps: Any, *more: Any) -> None:
            if self._closing or all(job.over for job in jobs):
                raise Cancelled("nobody waits for it any longer")
            # The other kind of pipeline gives the timestep there, and does not say how many follow.
            total = steps if isinstance(pipe, ProgramPipeline) else usual or pipe.manifest.sampling.steps
            for job in jobs:
                job.tell(step + 1, max(total, step + 1))

        seeds = [seed for job in jobs for seed in job.seeds]
        prompts = [job.prompt for job in jobs for _ in job.seeds]
        texts = {"num_images_per_prompt": len(seeds)} if prompts[0] is None else {"prompt": prompts}
        call: Any = pipe
        return list(call(**texts, seed=seeds, callback_on_step_end=ended, **jobs[0].arguments).images)

    def _end(self, job: Job, error: Exception | None) -> None:
        job.error = error
        try:
            job.end(job)
        except RuntimeError:  # its event loop is closed: nobody is there
            logger.debug("a client's loop is gone")
