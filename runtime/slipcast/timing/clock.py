"""An instrument of pipelines that keeps the time of every call of an engine, and a run on its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from slipcast.engines import Array, Engine, EngineWrapper, ProfiledEngine
from slipcast.run.pipeline import Pipeline
from slipcast.run.program import ProgramPipeline


@dataclass(frozen=True)
class Run:
    """One run on the clock; seconds since it began. `calls`: component, begin, end; `steps`: timestep, end. Of a
    captured program, whose timesteps lie in its table, those are None."""

    total: float
    calls: list[tuple[str, float, float]]
    steps: list[tuple[float | None, float]]


class Clock:
    """`calls`: component, begin and end of each, by time.perf_counter. `inputs`: what each component was first given.

    With `profile` it opens engines with their own profilers.
    """

    def __init__(self, profile: bool = False) -> None:
        self.calls: list[tuple[str, float, float]] = []
        self.inputs: dict[str, Mapping[str, Array]] = {}
        self._profile, self._open = profile, dict[str, list[Engine]]()

    def __call__(self, component: str, open: Callable[..., Engine]) -> Engine:
        engine = open(profile=True) if self._profile else open()
        opened = self._open.setdefault(component, [])
        opened.append(engine)
        return _Clocked(component, engine, self, opened)

    def profiled(self, component: str) -> ProfiledEngine:
        """The engine of a component that is open, of a clock that opens them with `profile`; its calls have no time."""
        return cast(ProfiledEngine, self._open[component][0])

    def run(self, pipe: Pipeline | ProgramPipeline, request: Mapping[str, Any]) -> Run:
        """A run of a pipeline whose instrument this is."""
        self.calls.clear()
        steps: list[tuple[float | None, float]] = []

        def ended(timestep: float | None) -> None:
            steps.append((timestep, time.perf_counter() - begin))

        begin = time.perf_counter()
        if isinstance(pipe, ProgramPipeline):
            pipe(**request, callback_on_step_end=lambda _, __, ___: ended(None))
        else:
            pipe(**request, callback_on_step_end=lambda _, __, timestep, ___: ended(timestep))
        total = time.perf_counter() - begin
        return Run(total, [(name, start - begin, end - begin) for name, start, end in self.calls], steps)


class _Clocked(EngineWrapper):
    """An engine with a clock around it."""

    def __init__(self, component: str, engine: Engine, clock: Clock, opened: list[Engine]) -> None:
        super().__init__(engine)
        self._component, self._clock, self._opened = component, clock, opened

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        self._clock.inputs.setdefault(self._component, arrays)
        begin = time.perf_counter()
        outputs = self.engine(arrays)
        self._clock.calls.append((self._component, begin, time.perf_counter()))
        return outputs

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.remove(self.engine)
        super().__exit__(kind, error, at)
