"""Which NVIDIA GPUs this process sees. No engine library is needed to ask, and none is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Gpu:
    """One device; `compute_capability` as in "8.9"."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Cuda:
    """The devices, in CUDA's order; `problem` says in one line why there is none. `driver`: the CUDA it supports."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    problem: str | None = None


@cache
def look() -> Cuda:
    """What CUDA says, asked once per process."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return Cuda(problem="cuda-bindings is not installed: pip install 'slipcast[tensorrt-rtx]'")
    from cuda.bindings import runtime

    try:
        _, version = runtime.cudaDriverGetVersion()
        driver = f"{version // 1000}.{version % 1000 // 10}" if version else None
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess or not count:
            why = f"{error.name}, driver for CUDA {driver}" if driver else "no NVIDIA driver"
            return Cuda(driver=driver, problem=f"no CUDA device ({why}): install one with a current driver")
        return Cuda(tuple(_gpu(runtime, index) for index in range(count)), driver)
    except RuntimeError as error:  # the bindings did not find the library that they bind
        return Cuda(problem=f"no CUDA device: {str(error).splitlines()[0]}")


def _gpu(runtime: object, index: int) -> Gpu:
    error, found = runtime.cudaGetDeviceProperties(index)  # type: ignore[attr-defined]
    if int(error):
        raise RuntimeError(f"device {index} does not answer ({error.name})")
    return Gpu(found.name.decode(), f"{found.major}.{found.minor}", found.totalGlobalMem)
