"""What the host can do at most, measured in the run itself: figures of two hosts are compared as shares of these."""

from __future__ import annotations

import time
from collections.abc import Callable

from slipcast.bundle.validation import Strict
from slipcast.engines import cpu_threads
from slipcast.progress import Advance

SIDE = 2048  # of the square matrices
COPIED = 2**28  # bytes; more than caches hold
ROUNDS = 5


class Peaks(Strict):
    """The best of a few products of two square matrices, in 1e9 operations a second (a multiply-add is two), and of
    copies, in 1e9 bytes read and written a second. By PyTorch on the threads that sides may use."""

    fp32: float
    bf16: float
    int8: float
    memory: float


def measure_peaks(_: Advance | None = None) -> Peaks:
    """Takes seconds; to be run in a process of its own, whose memory is gone after that."""
    import torch

    torch.set_num_threads(cpu_threads())
    operations = 2 * SIDE**3 / 1e9
    single = torch.rand(SIDE, SIDE)
    half = single.bfloat16()
    whole = torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8)
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Peaks(
        fp32=round(operations / _best(lambda: single @ single), 1),
        bf16=round(operations / _best(lambda: half @ half), 1),
        int8=round(operations / _best(lambda: torch._int_mm(whole, whole)), 1),
        memory=round(2 * COPIED / 1e9 / _best(lambda: target.copy_(source)), 1),
    )


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
