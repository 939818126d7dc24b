"""A search with evaluations that take no time, in a process that can be killed: python explored.py FOLDER SECONDS."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.reading import read_recipe
from slipcast_compiler.search.described import Described
from slipcast_compiler.search.explore import explore
from slipcast_compiler.search.journal import open_journal
from slipcast_compiler.search.space import Space

RECIPE = Path("recipes/shapes-circles-fast.toml")


def planned(*overrides: str) -> Plan:
    """The shipped recipe, with a [search]."""
    return make_plan(read_recipe(RECIPE, ("search.budget_minutes=1", *overrides)), RECIPE.parent)


class Formula:
    """Latency rises with the steps and falls with the heads that go, the distance the other way; each point that is
    measured is a line in `log`, written before its answer is given."""

    def __init__(self, log: Path | None = None, pause: float = 0.0) -> None:
        self.log, self.pause = log, pause

    def measure(self, overrides: dict[str, Any]) -> dict[str, Any]:
        if self.log:
            with self.log.open("a") as stream:
                stream.write(repr(sorted(overrides.items())) + "\n")
        time.sleep(self.pause)
        steps, heads = overrides.get("sampling.steps", 6), overrides.get("passes.prune_heads.ratio", 0.3)
        found = {"objective": steps * (1 - heads / 2) / 5.1, "distance": 1 / steps + heads**2, "prepare_s": 0.0}
        return found | {"ratio": found["objective"], "memory_mb": 200.0, "shown": "a formula"}

    def judge(self, overrides: dict[str, Any]) -> dict[str, Any]:
        steps, heads = overrides.get("sampling.steps", 6), overrides.get("passes.prune_heads.ratio", 0.3)
        clip = -0.08 * (1 / steps + heads**2)
        return {
            "quality": {"clip_delta_mean": clip + 0.004}, "bounds": {"clip_delta_mean": clip}, "holds": clip >= -0.02
        }  # fmt: skip


def main(folder: Path, seconds: float) -> None:
    """Search, on and on."""
    with open_journal(folder) as study:
        explore(
            study,
            Space(Described(planned())),
            Formula(folder.parent / "log", 0.02),
            seconds,
            0,
            lambda text, spent: None,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
