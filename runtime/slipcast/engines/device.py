"""What engines on a GPU need of CUDA: status codes as errors, memory that engines share, and captured graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from cuda.bindings import runtime as cuda

from slipcast.errors import HostError, ResourceError


def checked(result: tuple[Any, ...]) -> Any:
    """What a CUDA call returned after its status; ResourceError or HostError where that is none of success."""
    status, *values = result
    if status == cuda.cudaError_t.cudaErrorMemoryAllocation:
        raise ResourceError("GPU memory ran out", hint='load with residency="sequential", or ask for fewer images')
    if status != cuda.cudaError_t.cudaSuccess:
        raise HostError("CUDA failed", got=status.name, hint="run `slipcast doctor`; a lost device needs a new process")
    return values[0] if values else None


class Scratch:
    """Device memory for what an engine computes on its way: nobody needs it after a call, so all engines of a process
    use one piece of it, as large as the largest of them asks for, and take turns (`turn`)."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self._users = self._pointer = self._size = 0

    def join(self) -> None:
        """Of an engine, when it is opened."""
        with self.turn:
            self._users += 1

    def leave(self) -> None:
        """Of an engine, when it is closed; the last one gives the memory back."""
        with self.turn:
            self._users -= 1
            if not self._users:
                self._free()

    def reserve(self, size: int) -> int:
        """The address of at least `size` bytes, which is another one where it had to grow. To be called in `turn`."""
        if size > self._size:
            self._free()
            self._pointer = int(checked(cuda.cudaMalloc(size)))
            self._size = size
        return self._pointer

    def _free(self) -> None:
        if self._size:
            cuda.cudaFree(self._pointer)
        self._pointer = self._size = 0


SCRATCH = Scratch()


class Graphs:
    """Captured CUDA graphs of one call, by what decides its kernels: shapes and addresses."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._warm = set[Hashable]()
        self._captured: dict[Hashable, Any] = {}

    def run(self, key: Hashable, enqueue: Callable[[], bool]) -> bool:
        """Enqueue the work of a call, or launch what was captured of it; False where enqueueing failed.

        The first call with a key runs as it is: engines may do more then than later, which must not be captured.
        """
        if key not in self._warm:
            self._warm.add(key)
            return enqueue()
        if key not in self._captured:
            mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            checked(cuda.cudaStreamBeginCapture(self._stream, mode))
            done = enqueue()
            graph = checked(cuda.cudaStreamEndCapture(self._stream))
            if done:
                self._captured[key] = checked(cuda.cudaGraphInstantiate(graph, 0))
            checked(cuda.cudaGraphDestroy(graph))
            if not done:
                return False
        checked(cuda.cudaGraphLaunch(self._captured[key], self._stream))
        return True

    def clear(self) -> None:
        """Forget all of them, as where an address that they hold is no longer valid."""
        for graph in self._captured.values():
            cuda.cudaGraphExecDestroy(graph)
        self._captured, self._warm = {}, set()
