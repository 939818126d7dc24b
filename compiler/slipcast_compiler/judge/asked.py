"""What a captured pipeline is asked to draw, so that a bundle of it can be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

from slipcast_compiler.judge.captured import PipelineDrawing
from slipcast_compiler.model.original import Precision, Prompts
from slipcast_compiler.recipe.family import Family
from slipcast_compiler.recipe.recipe import EvaluateTable
from slipcast_compiler.recipe.seeds import GATE, OUT_OF_FAMILY

Calls = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Asked:
    """Of the pipeline at `root`, by its `calls`: held-out prompts of the family, and `strangers`, prompts that are out
    of it, which are judged apart."""

    root: Path
    pipeline: str | None
    calls: Calls
    family: Family | None
    strangers: tuple[str, ...]
    table: EvaluateTable

    def drawing(self, precision: Precision | None, device: str = "cpu") -> PipelineDrawing:
        """Of held-out prompts, one image each; the calls in turns, each at least once."""
        table, family = self.table, self.family
        count = 1 if table.original else table.images  # where nothing is compared, one is enough to see it run
        prompts: Prompts = family.held_out[:count] if family else (None,) * count
        turns = in_turns(prompts, len(self.calls))
        seeds = GATE.take(len(turns), table.seed)
        return PipelineDrawing(self.root, self.pipeline, self.calls, turns, seeds, precision, device)

    def outside(self, precision: Precision | None, device: str = "cpu") -> PipelineDrawing | None:
        """The same of prompts out of the family, by the default call."""
        if not (prompts := self.strangers):
            return None
        seeds = OUT_OF_FAMILY.take(len(prompts), self.table.seed)
        return PipelineDrawing(self.root, self.pipeline, self.calls[:1], prompts, seeds, precision, device)


def in_turns(prompts: Prompts, calls: int) -> Prompts:
    """The prompts, and from the first on again until there is one for each of the calls, which draw them in turns."""
    turns: Any = tuple(islice(cycle(prompts), max(len(prompts), calls)))
    return cast(Prompts, turns)
