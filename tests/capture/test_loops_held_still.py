"""Noise levels, and features to cache, found along the loop of a captured pipeline, whose model is the bundle's."""

from __future__ import annotations

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
from slipcast.errors import RecipeError, RequestError
from slipcast.sampling.denoiser import Denoiser
from slipcast.sampling.samplers import sample
from slipcast_compiler.engines.programs import ProgramGraphs, write_portable
from slipcast_compiler.engines.recording import Recording
from slipcast_compiler.export.program import PARTS
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.recipe.sampling import CachingTable, TimestepsTable
from slipcast_compiler.schedule import program_caching, program_timesteps
from slipcast_compiler.schedule.early_exit import replay_program
from slipcast_compiler.schedule.held import hold
from slipcast_compiler.schedule.program_caching import cache_program_features
from slipcast_compiler.schedule.program_timesteps import choose_program_timesteps

pytestmark = pytest.mark.slow  # a bundle for each; test_captured.py has the lever end to end

IMAGES = (("a large star", 3), ("a circle", 4))
COMPONENTS = ("start", "denoiser")


@pytest.fixture(scope="module", params=["stable_diffusion_xl", "stable_diffusion_3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ProgramManifest]:
    """A bundle, of noise that is scaled to its first level, and of noise as it is drawn."""
    folder = tmp_path_factory.mktemp(request.param)
    make_bundle(open_pipeline(request.param), request.param, folder)
    manifest = open_any_bundle(folder / "bundle").manifest
    assert isinstance(manifest, ProgramManifest)
    return folder, manifest


def test_the_model_is_the_bundles(made: tuple[Path, ProgramManifest]) -> None:
    folder, manifest = made
    loop, target = manifest.program.loop, manifest.targets[0].id
    assert loop
    ends = []
    recording = Recording(COMPONENTS)
    with slipcast.load(folder / "bundle", instrument=recording) as pipe:
        for prompt, seed in IMAGES:
            recording.calls.clear()
            pipe(prompt, seed=seed, output_type="np")
            ends.append(replay_program(manifest.program, seed, recording)[1][0])
    with hold(folder / "bundle", target, IMAGES, {}) as held:
        schedule = loop.sampling.lay()
        x = held.start(schedule.sigmas[0])

        def denoise(x: Any, sigma: float) -> Any:
            return Denoiser(loop.sampling.noise, schedule, lambda s, t: held.predict(s, t, sigma))(x, sigma)

        *_, end = sample(loop.sampling.sampler, denoise, x, schedule.sigmas)
    np.testing.assert_array_equal(end, np.stack(ends))


def test_levels_are_found(made: tuple[Path, ProgramManifest], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = made
    monkeypatch.setattr(program_timesteps, "run_isolated", in_process)
    (entry,) = (each.parent for each in (folder / "cache").rglob(PARTS))
    graphs, cache = ProgramGraphs(entry), Cache(folder / "cache")
    table, own = TimestepsTable(method="direct", prompts=2, fine_steps=8), manifest.program.loop
    assert own
    found, report = choose_program_timesteps(graphs, IMAGES, {}, table, cache, lambda *_: None)
    usual = own.sampling.lay()
    assert report["error"] < report["compared"][own.sampling.schedule]["error"]
    assert len(report["sigmas"]) == len(usual.sigmas)
    if not own.sampling.noise.is_flow:
        assert report["sigmas"][0] == usual.sigmas[0]  # to which the noise is scaled
    loop = found.record.loop
    assert loop and loop.sampling.sigmas == tuple(report["sigmas"]) and loop.sampling.schedule is None
    assert loop.free == ("guidance_scale",)
    monkeypatch.setattr(program_timesteps, "run_isolated", None)  # it is not found again
    assert choose_program_timesteps(graphs, IMAGES, {}, table, cache, lambda *_: None) == (found, report)
    (bundle := folder / "found").mkdir()
    write_portable(found, bundle, cache)
    with slipcast.load(bundle) as pipe:
        drawn = pipe("a circle", seed=4, output_type="np")
        assert drawn.steps == (len(usual.timesteps),)
        with pytest.raises(RequestError, match="its schedule is an explicit list"):
            pipe("a circle", num_inference_steps=7)
    with slipcast.load(folder / "bundle") as pipe:
        assert (pipe("a circle", seed=4, output_type="np").images[0] != drawn.images[0]).any()


def test_a_shallow_denoiser_is_the_whole_one(
    made: tuple[Path, ProgramManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the features of its own step; of a transformer there is none that is worth it."""
    folder, manifest = made
    monkeypatch.setattr(program_caching, "run_isolated", in_process)
    (entry,) = (each.parent for each in (folder / "cache").rglob(PARTS))
    graphs, cache, table = ProgramGraphs(entry), Cache(folder / "cache"), CachingTable(full_steps=2, share=0.2)
    assert manifest.program.loop
    if manifest.program.loop.sampling.noise.is_flow:
        with pytest.raises(RecipeError, match="it is for U-Nets"):
            cache_program_features(graphs, IMAGES, {}, table, cache, lambda *_: None)
        return
    table = CachingTable(full_steps=2, share=0.9)
    found, report = cache_program_features(graphs, IMAGES, {}, table, cache, lambda *_: None)
    assert report["mask"][0] and sum(report["mask"]) == 2 and report["error"] > 0
    (bundle := folder / "cached").mkdir()
    write_portable(found, bundle, cache)
    recording = Recording(("denoiser", "denoiser_shallow"))
    with slipcast.load(bundle, instrument=recording) as pipe:
        pipe("a circle", seed=4, output_type="np")
        assert [name == "denoiser" for name, _ in recording.calls] == report["mask"]
        whole = recording.evaluations("denoiser")[0]
        with pipe.residency.use("denoiser_shallow") as shallow:
            again = shallow({spec.name: whole[spec.name] for spec in shallow.inputs})
    for name, array in again.items():
        np.testing.assert_allclose(array, whole[name], atol=1e-5)
