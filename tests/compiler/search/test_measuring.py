"""Trials on engines that stay open: pictures are those of a pipeline of its own, and no engine is opened twice."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import slipcast
from slipcast.bundle.reader import open_bundle
from slipcast.engines import open_engine
from slipcast_compiler.search import measuring as module
from slipcast_compiler.search.described import GraphsVariant
from slipcast_compiler.search.measuring import Image, Job, Measuring

IMAGES = (Image("a small red circle on a white background", 4), Image("a large blue circle", 5))


@pytest.mark.slow
def test_engines_are_lent(shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def count(engine: str, model: Path, *rest: object) -> object:
        opened.append(model.stem)
        return open_engine(engine, model, *rest)  # type: ignore[arg-type]

    with slipcast.load(shapes_bundle) as pipe:
        expected = [pipe(each.prompt, seed=each.seed, output_type="np").images[0] for each in IMAGES]
    np.savez(tmp_path / "originals.npz", **{"0": expected[0], "1": expected[1] - 0.5})
    monkeypatch.setattr("slipcast.run.base.open_engine", count)
    sampling = open_bundle(shapes_bundle).manifest.sampling
    own = GraphsVariant(shapes_bundle, sampling, None)
    measuring = Measuring(Job(own, IMAGES, tmp_path / "originals.npz"))
    np.testing.assert_array_equal(measuring.draw(own, IMAGES), expected)
    assert measuring.measure(own)["distance"] == pytest.approx(0.25)  # of one half a unit, of the other none
    fewer = sampling.model_copy(update={"guidance_interval": (0.5, 5.0)})
    assert measuring.measure(GraphsVariant(shapes_bundle, fewer, None))["distance"] > 0.25
    assert len(opened) == len(set(opened)) == len(open_bundle(shapes_bundle).manifest.components)


def test_both_take_turns_in_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a run, a warm cache or a busy core, falls on the trial and on the recipe alike."""
    ran: list[tuple[str, Any]] = []

    def run(pipe: Any, images: Any) -> None:
        ran.append((pipe.name, *images))
        time.sleep(pipe.seconds)

    class Pipe(SimpleNamespace):
        __hash__ = object.__hash__

    own, baseline = Pipe(name="own", seconds=0.03), Pipe(name="baseline", seconds=0.0)
    measured: Any = Measuring.__new__(Measuring)
    measured._job, measured._baseline = SimpleNamespace(images=IMAGES), baseline
    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    pairs = [measured._pair(own, turn) for turn in range(4)]
    assert all(took > 0.03 > other for took, other in pairs)
    firsts, seconds = [name for name, *_ in ran[::2]], [name for name, *_ in ran[1::2]]
    assert firsts in (["own", "baseline"] * 2, ["baseline", "own"] * 2)
    assert seconds == firsts[1:] + firsts[:1]
    assert [each[1:] for each in ran[::2]] == [each[1:] for each in ran[1::2]]  # of the same picture
    assert len({each[1].seed for each in ran}) == 2
