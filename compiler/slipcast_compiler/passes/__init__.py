"""Passes: rewrites of the denoiser's weights before its export. A file, a line in PASSES and a field in PassesTable.

A pass reads the denoiser as earlier passes left it, and the profile, and returns changed tensors with a report. It
knows nothing of other passes; their order is that of PASSES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slipcast.bundle.validation import Strict
from slipcast_compiler.passes import low_rank, prune_ffn, prune_heads, recover
from slipcast_compiler.passes.context import Context, Result
from slipcast_compiler.passes.low_rank import LowRank
from slipcast_compiler.passes.prune_ffn import PruneFFN
from slipcast_compiler.passes.prune_heads import PruneHeads
from slipcast_compiler.passes.recover import Recover
from slipcast_compiler.precision.quantize import QuantizeOptions

if TYPE_CHECKING:
    from slipcast_compiler.plan import Plan

__all__ = ["PASSES", "Context", "Pass", "PassesTable", "Result"]


class PassesTable(Strict):
    """[passes]: a table for each pass that is on."""

    prune_heads: PruneHeads | None = None
    prune_ffn: PruneFFN | None = None
    low_rank: LowRank | None = None
    recover: Recover | None = None
    quantize: QuantizeOptions | None = None  # after the export, on the graph: not one of PASSES

    def chosen(self) -> list[tuple[str, Any]]:
        """(name, options) of the passes that are on, in their order."""
        return [(name, getattr(self, name)) for name in PASSES if getattr(self, name) is not None]


@dataclass(frozen=True)
class Pass:
    """`run(denoiser, context, options)`; `needs_profile(options)`: whether it reads what was measured on the family;
    `reads(plan)`: what else it reads, as JSON, for the cache's key."""

    run: Callable[[Any, Context, Any], Result]
    needs_profile: Callable[[Any], bool]
    reads: Callable[[Plan], dict[str, Any]] = lambda plan: {}


# In the order in which they run: what is removed need not be factorised, and what is lost is recovered at the end.
PASSES: dict[str, Pass] = {
    "prune_heads": Pass(prune_heads.run, prune_heads.needs_profile),
    "prune_ffn": Pass(prune_ffn.run, prune_ffn.needs_profile),
    "low_rank": Pass(low_rank.run, low_rank.needs_profile, low_rank.reads),
    "recover": Pass(recover.run, recover.needs_profile, recover.reads),
}
