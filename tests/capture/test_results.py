"""What a pipeline returns is told by how it is made: pictures, videos, sounds, and how many a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import bundle_of
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from test_refusals import Denoiser, Plain
from tiny import PIPELINES, call_of, open_pipeline

import slipcast
from slipcast.cli.program_lines import program_lines
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.results import output_of

GIVES = {
    "stable_diffusion": ("image", None),
    "ltx": ("frames", 25.0),  # positions follow it
    "animate_diff": ("frames", None),
    "stable_audio_edm": ("audio", 4.0),
}


@pytest.mark.parametrize("name", GIVES)
def test_what_a_pipeline_gives(name: str) -> None:
    pipe, call = open_pipeline(name), call_of(name, "a red circle", 1)
    fixed = {"frame_rate": 25} if name == "ltx" else PIPELINES[name].call
    gives = output_of(capture(pipe, call), pipe, fixed)
    assert (gives.kind, gives.rate) == GIVES[name] and gives.sound is None


class Vocoder(Denoiser):
    """Makes a sound of three numbers of two channels."""

    @register_to_config
    def __init__(self, sampling_rate: int = 8000) -> None:
        super().__init__()


class Film(Plain):
    """Gives a video, and its sound: a picture at each time."""

    def __init__(self, denoiser: Denoiser, scheduler: Any, vocoder: Vocoder) -> None:
        super().__init__(denoiser, scheduler)
        self.register_modules(vocoder=vocoder)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 3, frame_rate: float = 12.0, generator: Any = None) -> Any:
        x = super().__call__(num_inference_steps, generator)["x"]
        video = x.reshape(1, 3, 1, 2, 1).expand(1, 3, 3, 2, 4).clamp(0, 1)
        return {"frames": video, "audio": self.vocoder(x).T[None]}


def test_a_video_has_its_sound(tmp_path: Path) -> None:
    pipe = Film(Denoiser(), DDIMScheduler(), Vocoder())
    call = {"generator": torch.Generator().manual_seed(3)}
    bundle = bundle_of(pipe, "film", [lambda _: {"generator": torch.Generator().manual_seed(1)}], tmp_path)
    with slipcast.load(bundle) as loaded:
        found = loaded(seed=3, output_type="np")
    wanted = pipe(**call)
    assert (found.kind, found.rate, found.sound_rate) == ("frames", 12.0, 8000.0)
    np.testing.assert_allclose(found.images[0], wanted["frames"][0].movedim(1, -1), atol=1e-5)
    assert [sound.shape for sound in found.sounds] == [(2, 3)]
    np.testing.assert_allclose(found.sounds[0], wanted["audio"][0], atol=1e-5)
    assert "videos of 12 frames a second with sound of 8000 samples a second" in "\n".join(
        program_lines(loaded.manifest)
    )


def test_latents_are_arrays() -> None:
    pipe, call = open_pipeline("stable_audio_edm"), call_of("stable_audio_edm", "a red circle", 1)
    assert output_of(capture(pipe, call | {"output_type": "latent"}), pipe, {}).kind == "array"
