"""A side's process, seen from the benchmark: start, ask, end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from slipcast import errors
from slipcast.engines import cpu_threads
from slipcast.errors import SlipcastError

Floats = npt.NDArray[np.float32]
WORKER = Path(__file__).with_name("worker.py")


class SideError(SlipcastError):
    """A side could not do its part."""


@dataclass(frozen=True)
class Drawn:
    """One call of a side: pictures float32 [n, h, w, c] in [0, 1], and the process's peak memory after it."""

    images: Floats
    seconds: float
    components_s: dict[str, float] | None
    peak_memory_mb: float


class SideProcess(AbstractContextManager["SideProcess"]):
    """worker.py under `interpreter` with `job`. Raises SideError, or the side's own error where it is slipcast's."""

    def __init__(self, name: str, interpreter: str, job: dict[str, Any]) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="slipcast-bench-")
        self._log = (Path(self._folder.name) / "log").open("w+", encoding="utf-8", errors="replace")
        self._begun = time.perf_counter()
        # -P: the worker's own folder holds modules with the names of libraries.
        self._process = subprocess.Popen(
            [interpreter, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(interpreter, self._folder.name),
        )
        self._job = job

    @property
    def age_s(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._begun

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def open(self) -> dict[str, Any]:
        """Load the side (or, with job["prepare"], prepare it): its answer."""
        return self._ask(self._job)

    def draw(self, prompts: list[str | None], seeds: list[int]) -> Drawn:
        """One batch."""
        file = Path(self._folder.name) / "images.npy"
        answer = self._ask({"prompts": prompts, "seeds": seeds, "file": str(file)})
        return Drawn(np.load(file), answer["seconds"], answer["components_s"], answer["peak_memory_mb"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log.closed:
            return
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            hint = (
                "exit code -9 means that memory ran out: close other programs, or compare by --against in several runs"
            )
            raise SideError(
                f"{self.name}: its process died",
                expected="an answer",
                got=f"exit code {code}\n{self._tail()}",
                hint=hint,
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["error"], None)
            if isinstance(kind, type) and issubclass(kind, SlipcastError):
                raise kind(answer["message"])
            first, *_ = answer["message"].strip().splitlines() or [""]
            raise SideError(f"{self.name}: {answer['error']}: {first}", got=self._tail())
        return answer

    def _tail(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return "\n".join([line for line in self._log.read().splitlines() if line.strip()][-5:])


def _environment(interpreter: str, scratch: str) -> dict[str, str]:
    """The same threads for all; no network; no compiled kernels of earlier runs, which would flatter a cold start."""
    own = interpreter == sys.executable
    inherited = {key: value for key, value in os.environ.items() if own or not key.startswith("PYTHON")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cpu_threads()))
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    return inherited | threads | offline | {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor"}
