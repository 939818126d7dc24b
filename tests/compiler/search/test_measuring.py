"""Trials on engines that stay open: pictures are those of a pipeline of its own, and no engine is opened twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slipcast
from slipcast.bundle.reader import open_bundle
from slipcast.engines import open_engine
from slipcast_compiler.search.measuring import Job, Measuring, Variant

PROMPTS, SEEDS = ("a small red circle on a white background", "a large blue circle"), (4, 5)


def test_engines_are_lent(shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def count(engine: str, model: Path, *rest: object) -> object:
        opened.append(model.stem)
        return open_engine(engine, model, *rest)  # type: ignore[arg-type]

    with slipcast.load(shapes_bundle) as pipe:
        expected = pipe(list(PROMPTS), seed=list(SEEDS), output_type="np").images
        latents = pipe(list(PROMPTS), seed=list(SEEDS), output_type="latent").images
    np.save(tmp_path / "latents.npy", latents)
    monkeypatch.setattr("slipcast.run.pipeline.open_engine", count)
    sampling = open_bundle(shapes_bundle).manifest.sampling
    own = Variant(shapes_bundle, sampling, None)
    measuring = Measuring(Job(own, PROMPTS, SEEDS, tmp_path / "latents.npy"))
    np.testing.assert_array_equal(measuring.draw(own, PROMPTS, SEEDS), expected)
    assert measuring.measure(own)["distance"] == 0
    fewer = sampling.model_copy(update={"guidance_interval": (0.5, 5.0)})
    assert measuring.measure(Variant(shapes_bundle, fewer, None))["distance"] > 0
    assert len(opened) == len(set(opened)) == len(open_bundle(shapes_bundle).manifest.components)
