"""The original is diffusers' own pipeline; where it lacks a schedule, its modules under our samplers are as good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipcast.manifest import Sampling
from slipcast.samplers import SAMPLERS
from slipcast.schedules import SCHEDULES
from slipcast_compiler import original
from slipcast_compiler.model import Checkpoint

SHAPES = Path("recipes/models/shapes").resolve()
NOISE = Checkpoint(SHAPES, "shapes").process


def _sampling(sampler: str, schedule: str, **settings: Any) -> Sampling:
    return Sampling(sampler=sampler, schedule=schedule, steps=5, guidance_scale=4.0, noise=NOISE, **settings)


def _draw(sampling: Sampling) -> Any:
    made = original.make_images(SHAPES, sampling, (64, 64), ["a red ring on white"], [3], "float32", lambda *_: None)
    return made["images"]


@pytest.mark.parametrize(
    "sampling",
    [
        _sampling("dpmpp_2m", "leading"),
        _sampling("dpmpp_2m", "karras", guidance_rescale=0.7),
        _sampling("ddim", "trailing", eta=0.5),
        _sampling("euler_ancestral", "leading"),
        _sampling("unipc", "exponential"),
        _sampling("lcm", "lcm"),
    ],
    ids=lambda s: f"{s.sampler}-{s.schedule}",
)
def test_both_ways_agree(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = _draw(sampling)
    monkeypatch.setattr(original, "has_scheduler", lambda sampling: False)
    ours = _draw(sampling)
    assert theirs.std() > 0.02
    assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.parametrize("sampling", [_sampling("dpmpp_sde", "karras"), _sampling("dpmpp_3m_sde", "leading")])
def test_what_diffusers_lacks_is_drawn_all_the_same(sampling: Sampling) -> None:
    assert not original.has_scheduler(sampling)
    assert _draw(sampling).std() > 0.02


def test_tables_name_what_the_runtime_knows() -> None:
    assert set(original.SCHEDULERS) < set(SAMPLERS)
    assert set(original.SCHEDULES) < set(SCHEDULES)
    assert not original.has_scheduler(_sampling("euler", "ays_sd15"))
