"""[timesteps] of a captured program: noise levels found along the trajectories of its own loop, in ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slipcast.progress import Advance
from slipcast.sampling.samplers import Array
from slipcast.sampling.schedules import Schedule
from slipcast_compiler.engines.programs import ProgramGraphs, write_portable
from slipcast_compiler.engines.recording import digest_given
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.original import Images
from slipcast_compiler.recipe.sampling import TimestepsTable
from slipcast_compiler.schedule.held import hold
from slipcast_compiler.schedule.timesteps import REPORT, Model, search


def choose_program_timesteps(
    graphs: ProgramGraphs, images: Images, given: Mapping[str, Any], table: TimestepsTable, cache: Cache,
    advance: Advance,
) -> tuple[ProgramGraphs, dict[str, Any]]:  # fmt: skip
    """With noise levels found as [timesteps] asks, by the default variant, and a report of how far each list is off.

    `images`: of calibration prompts; `given`: what calls take besides a text.
    """

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".timesteps-", dir=out.parent) as name:
            target = write_portable(graphs, Path(name), cache)
            arguments = Path(name), target.id, images, dict(given), table
            found = run_isolated(_find, *arguments, advance=advance).result
        (out / REPORT).write_text(json.dumps(found, allow_nan=False))

    asked = {"images": images, "given": digest_given(given), "table": table.model_dump(mode="json")}
    report: dict[str, Any] = json.loads((cache.get("timesteps", graphs.identity | asked, make) / REPORT).read_text())
    own = [variant.loop.sampling for variant in graphs.record.every if variant.loop]
    changes = {"schedule": None, "timesteps": None, "sigmas": tuple(report["sigmas"])}
    return replace(graphs, samplings=tuple(each.model_copy(update=changes) for each in own)), report


def _find(
    root: Path, target: str, images: Images, given: Mapping[str, Any], table: TimestepsTable, advance: Advance
) -> dict[str, Any]:
    """Runs in a process of its own."""
    with hold(root, target, images, given) as held:
        # Guidance lies within the model, which is evaluated as of one branch.
        sampling = held.loop.sampling.model_copy(update={"guidance_scale": 1.0})

        def evaluate(x: Array, timestep: float, sigma: float, both: bool) -> tuple[Array, None]:
            return held.predict(x, timestep, sigma), None

        def start(first: Schedule | float) -> Array:
            return held.start(first.sigmas[0] if isinstance(first, Schedule) else first)

        return search(Model(sampling, evaluate, start, not held.loop.vp), table.method, table.fine_steps, advance)
