"""Passes: rewrites of the denoiser's weights before its export. A file, a line in PASSES, a table in recipe/passes.py.

A pass reads the denoiser as earlier passes left it, and the profile, and returns changed tensors with a report. It
knows nothing of other passes; their order is that of PASSES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slipcast_compiler.passes import low_rank, prune_ffn, prune_heads, recover
from slipcast_compiler.passes.context import Context, DescribedTask, Result, Task
from slipcast_compiler.passes.units import reads_profile

__all__ = ["PASSES", "Context", "DescribedTask", "Pass", "Result", "Task"]


@dataclass(frozen=True)
class Pass:
    """`run(denoiser, context, options)`; `needs_profile(options)`: whether it reads what was measured on the family;
    `reads(task)`: what else it reads, as JSON, for the cache's key."""

    run: Callable[[Any, Context, Any], Result]
    needs_profile: Callable[[Any], bool]
    reads: Callable[[Task], dict[str, Any]] = lambda task: {}


# In the order in which they run: what is removed need not be factorised, and what is lost is recovered at the end.
PASSES: dict[str, Pass] = {
    "prune_heads": Pass(prune_heads.run, reads_profile),
    "prune_ffn": Pass(prune_ffn.run, reads_profile),
    "low_rank": Pass(low_rank.run, low_rank.needs_profile, low_rank.reads),
    "recover": Pass(recover.run, recover.needs_profile, recover.reads),
}
