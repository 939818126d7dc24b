"""What a pipeline returns is told by how it is made: pictures, videos, sounds, and how many a second."""

from __future__ import annotations

import pytest
from tiny import PIPELINES, call_of, open_pipeline

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
    assert output_of(capture(pipe, call), pipe, fixed) == GIVES[name]


def test_latents_are_arrays() -> None:
    pipe, call = open_pipeline("stable_audio_edm"), call_of("stable_audio_edm", "a red circle", 1)
    assert output_of(capture(pipe, call | {"output_type": "latent"}), pipe, {})[0] == "array"
