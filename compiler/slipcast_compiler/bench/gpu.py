"""Memory and energy of NVIDIA GPUs by NVML, where there are any and nvidia-ml-py is installed."""

from __future__ import annotations

import importlib
from typing import Any


class Gpus:
    """All GPUs of the host. What NVML does not tell is None."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._last: list[int] | None = None
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        except Exception:  # not installed, no driver, no permission: its error is of a class that may not be here
            return
        self._nvml = nvml
        self._last = self._millijoules()

    def __len__(self) -> int:
        return len(self._handles)

    def read(self) -> float | None:
        """Joules of all GPUs since the last call, whoever used them; None where one does not count them."""
        now, before = self._millijoules(), self._last
        self._last = now
        return None if now is None or before is None else (sum(now) - sum(before)) / 1e3

    def memory_mb(self, pid: int) -> float | None:
        """Megabytes (1e6 bytes) that the process holds on all GPUs; None where NVML does not list it."""
        found = []
        for handle in self._handles:
            try:
                running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except self._nvml.NVMLError:
                continue
            found += [each.usedGpuMemory for each in running if each.pid == pid and each.usedGpuMemory is not None]
        return sum(found) / 1e6 if found else None

    def _millijoules(self) -> list[int] | None:
        try:
            return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles] or None
        except self._nvml.NVMLError:  # before Volta
            return None
