"""Early exit of captured pipelines: what is measured is the run's own, and what is chosen costs what it may."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundling import make_bundle
from tiny import open_pipeline

import slipcast
from conftest import in_process
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import open_any_bundle
from slipcast.progress import Stages
from slipcast.run.program import ProgramPipeline
from slipcast_compiler.engines.recording import Recording
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.schedule import early_exit
from slipcast_compiler.schedule.early_exit import Measuring, choose_exits, replay_program

pytestmark = pytest.mark.slow  # a bundle for each; test_captured.py has the lever end to end

STEPS = 6


@pytest.fixture(scope="module", params=["stable_diffusion_xl", "stable_diffusion_3"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of noise levels above 1, and of flow matching."""
    name = request.param
    return make_bundle(open_pipeline(name), name, tmp_path_factory.mktemp(name))


def sampled(bundle: Path, threshold: float | None = None, **changes: Any) -> tuple[ProgramManifest, Any]:
    """The manifest, and the pipeline, of the bundle with another sampling, and a threshold."""
    opened = open_any_bundle(bundle)
    manifest = opened.manifest
    assert isinstance(manifest, ProgramManifest) and manifest.program.loop
    loop = manifest.program.loop
    changed = loop.model_copy(update={"sampling": loop.sampling.model_copy(update={"steps": STEPS, **changes})})
    manifest = manifest.model_copy(update={"program": manifest.program.model_copy(update={"loop": changed})})
    target = manifest.targets[0].model_copy(update={"early_exit": threshold})
    return manifest, lambda **how: ProgramPipeline(replace(opened, manifest=manifest), target, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_run_is_made_again_from_what_its_denoiser_gave(bundle: Path, sampler: str) -> None:
    recording = Recording(("start", "denoiser", "decoder"))
    flow = open_any_bundle(bundle).manifest.program.loop.sampling.noise.is_flow  # type: ignore[union-attr]
    manifest, opened = sampled(bundle, sampler="heun" if flow and sampler != "euler" else sampler)
    with opened(instrument=recording) as pipe:
        pipe("a large star", seed=11, output_type="np")
    clean, end = replay_program(manifest.program, 11, recording)
    (decoded,) = recording.evaluations("decoder")
    read = next(call for call in manifest.program.calls if call.component == "decoder").inputs
    (name,) = (name for name, value in read.items() if value == manifest.program.loop.result)  # type: ignore[union-attr]
    np.testing.assert_array_equal(end[0], decoded[name])
    assert len(clean) == len(recording.evaluations("denoiser")) >= STEPS


def test_thresholds_are_chosen_of_a_program(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_exit, "run_isolated", in_process)
    images = (("a large star", 3), ("a circle", 4))
    cache, targets = Cache(tmp_path / "cache"), open_any_bundle(bundle).manifest.targets
    few, told = choose_exits(bundle, targets, 1e-9, Measuring(images, ({},)), cache, Stages())
    assert few[0].early_exit is None and told["targets"][targets[0].id]["evaluations"] == 3
    measuring = Measuring(images, ({"num_inference_steps": 3},))
    chosen, told = choose_exits(bundle, targets, 0.9, measuring, cache, Stages())
    found = told["targets"][targets[0].id]
    assert found["evaluations"] == 2 and 0 < found["error"] <= 0.9
    assert chosen[0].early_exit == found["threshold"]
    opened = open_any_bundle(bundle)
    with ProgramPipeline(opened, chosen[0]) as pipe:  # type: ignore[arg-type]
        drawn = pipe([prompt for prompt, _ in images], seed=[seed for _, seed in images], output_type="np")
    assert drawn.steps == (2, 2)
    with slipcast.load(bundle) as pipe:
        assert pipe("a circle", seed=4, output_type="np").steps == (3,)
