"""What half precision is measured on: as few steps as cover all noise levels, where the steps may be fewer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from slipcast.bundle.manifest import Caching, ImageGeometry, Sampling, TensorSpec
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.model.original import Original
from slipcast_compiler.precision.casts import _shortened
from slipcast_compiler.precision.mixed import SAMPLES


def _graphs(**sampling: Any) -> Graphs:
    image = ImageGeometry(width=16, height=16, channels=4, factor=1, tile=16, overlap=4)
    settings = {"sampler": "euler", "schedule": "leading", "guidance_scale": 1.0, "noise": NoiseProcess(), **sampling}
    chosen = Sampling(**settings)
    return Graphs("x", Original(Checkpoint(__file__, "m"), image, {}, {}), None, chosen, chosen, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "measured"), [(20, SAMPLES), (SAMPLES, SAMPLES), (2, 2), (1, 1)])
def test_no_more_steps_than_are_measured_and_no_more_than_there_are(steps: int, measured: int) -> None:
    graphs = _graphs(steps=steps)
    short = _shortened(graphs)
    assert short.sampling.steps == measured
    assert short.sampling == graphs.sampling.model_copy(update={"steps": measured})
    assert len(short.sampling.lay().timesteps) == measured


def test_lists_and_masks_keep_their_length() -> None:
    listed = _graphs(steps=6, schedule=None, sigmas=(9.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.0))
    assert _shortened(listed) is listed
    feature = TensorSpec(name="f", dtype="float32", shape=("batch", 4))
    cached = dataclasses.replace(_graphs(steps=6), caching=Caching(features=(feature,), mask=(True,) * 6, share=0.2))
    assert _shortened(cached) is cached
