"""What goes in and out of a bundle's engines while it draws: for INT8 real evaluations, over all timesteps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipcast.bundle.reader import open_bundle
from slipcast.engines import open_engine
from slipcast.run.pipeline import Pipeline
from slipcast.run.step_table import read_step_table
from slipcast_compiler.engines.recording import Recording, record
from slipcast_compiler.schedule.early_exit import replay

PROMPTS = ("a small red circle on a white background", "a large blue circle on a navy background", "a circle")
IMAGES = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)]


def test_samples_are_the_denoisers_own_and_cover_the_schedule(shapes_bundle: Path, tmp_path: Path) -> None:
    target = open_bundle(shapes_bundle).manifest.targets[0].id
    record(shapes_bundle, target, ("denoiser",), IMAGES, 20, tmp_path, lambda done, total: None)
    files = sorted((tmp_path / "denoiser").iterdir())
    assert [file.name for file in files] == [f"{i:04}.npz" for i in range(20)]
    samples = [dict(np.load(file)) for file in files]
    bundle = open_bundle(shapes_bundle)
    cut = bundle.manifest.cut
    assert cut
    table = np.concatenate([row["row"] for row in read_step_table(bundle.path(cut.step_table), cut).values()])
    seen = {int(np.flatnonzero((table == sample["row"]).all(-1))[0]) for sample in samples}  # places in the schedule
    assert len(seen) > 14  # each of three images gives six or seven of twenty steps, and not the same ones
    assert min(seen) <= 2 and max(seen) >= len(table) - 3

    target = bundle.manifest.targets[0]
    files_of, contract = target.components["denoiser"], bundle.manifest.components["denoiser"]
    weights = bundle.path(files_of.weights) if files_of.weights else None
    with open_engine(target.engine, bundle.path(files_of.model), weights, target.precision, contract) as engine:
        for sample in samples[::7]:
            expected = sample.pop("prediction")
            assert sample["sample"].shape[0] == 2  # unconditional and conditional
            np.testing.assert_array_equal(engine(sample)["prediction"], expected)


def test_every_component_is_asked(shapes_bundle: Path, tmp_path: Path) -> None:
    """What a timestep gives is tabled in this bundle, and computed all the same."""
    target = open_bundle(shapes_bundle).manifest.targets[-1]
    record(shapes_bundle, target.id, tuple(target.components), IMAGES[:2], 4, tmp_path, lambda done, total: None)
    found = {folder.name: len(list(folder.iterdir())) for folder in tmp_path.iterdir()}
    assert found == {"text_encoder": 2, "denoiser_prompt": 2, "denoiser_step": 4, "denoiser": 4, "vae_decoder": 2}
    step = dict(np.load(tmp_path / "denoiser_step" / "0003.npz"))
    assert set(step) == {"timestep", "row"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_interval": (0.5, 5.0)},
        {"sampler": "heun", "steps": 4, "guidance_reuse": 2},
        {"sampler": "dpmpp_2m_sde", "steps": 5},
    ],
)
def test_a_run_is_made_again_from_what_its_denoiser_gave(shapes_bundle: Path, changes: dict[str, Any]) -> None:
    """To the bit: clean images, of which early exit goes by, are those of the run."""
    bundle, recording = open_bundle(shapes_bundle), Recording(("denoiser",))
    sampling = bundle.manifest.sampling.model_copy(update=changes)
    manifest = bundle.manifest.model_copy(update={"sampling": sampling})
    with Pipeline(dataclasses.replace(bundle, manifest=manifest), manifest.targets[0], instrument=recording) as pipe:
        latents = pipe(PROMPTS[0], seed=11, output_type="latent").images
    predictions = [arrays["prediction"] for arrays in recording.evaluations("denoiser")]
    clean, end = replay(manifest, 11, predictions)
    np.testing.assert_array_equal(end, latents)
    assert len(clean) == len(predictions) >= sampling.steps
