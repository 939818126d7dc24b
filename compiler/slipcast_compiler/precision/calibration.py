"""Calibration data: what components really read, on calibration prompts, over all timesteps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from slipcast.bundle.manifest import Sampling
from slipcast.progress import Advance
from slipcast_compiler.engines.contents import PORTABLE, write_bundle
from slipcast_compiler.engines.recording import record
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated

TRAJECTORIES = 8  # at least so many, with as many prompts and seeds, where samples are few


def calibration_samples(
    graphs: Graphs, sampling: Sampling, components: Collection[str], count: int, cache: Cache, advance: Advance
) -> Path:
    """A directory with `count` evaluations of the denoiser, denoiser/0000.npz and so on, from the cache or made; and of
    other `components` as many as there were.

    Each holds the denoiser's inputs by name, with guidance in the batch, and its `prediction` in fp32, as the exported
    graphs give them in the runtime, by this `sampling`. Of every trajectory other steps are kept, so that together they
    cover all of them.
    """
    images = min(count, max(TRAJECTORIES, math.ceil(count / sampling.steps)))
    return record_inputs(replace(graphs, sampling=sampling), components, images, count, cache, advance)


def record_inputs(
    graphs: Graphs, components: Collection[str], images: int, count: int, cache: Cache, advance: Advance
) -> Path:
    """The same of as many `images` of calibration prompts, sampled as the graphs' bundle samples."""
    drawn = graphs.calibration(images)

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".calibration-", dir=out.parent) as name:
            target = write_bundle(graphs, PORTABLE, Path(name), cache)
            run_isolated(record, Path(name), target.id, tuple(components), drawn, count, out, advance=advance)

    inputs = {"graphs": graphs.identity, "images": drawn, "count": count, "components": sorted(components)}
    return cache.get("calibration", inputs, make)
