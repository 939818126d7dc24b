"""Results on disk are what was given, in the form that the suffix says."""

from __future__ import annotations

import sys
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import slipcast
from slipcast.errors import HostError, RequestError
from slipcast.run.base import PipelineOutput, to_pil

HEIGHT, WIDTH, COUNT = 33, 48, 6


def made(kind: Any, *results: Any, rate: float | None = None) -> PipelineOutput:
    return PipelineOutput(list(results), tuple(range(7, 7 + len(results))), "x", kind=kind, rate=rate)


def frames(shift: float = 0) -> Any:
    """float32 [COUNT, HEIGHT, WIDTH, 3]: a soft colour that moves."""
    y, x, t = (np.linspace(0, 1, size) for size in (HEIGHT, WIDTH, COUNT))
    levels = np.empty((COUNT, HEIGHT, WIDTH, 3), np.float32)
    levels[..., 0] = 0.9 * y[:, None]
    levels[..., 1] = 0.2 + 0.6 * x
    levels[..., 2] = (t[:, None, None] + shift) / 2
    return levels


def pictures(levels: Any) -> list[Image.Image]:
    return [to_pil(level) for level in levels]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
@pytest.mark.parametrize(("rate", "fps", "lasts"), [(None, None, 600), (24, None, 250), (24, 5, 1200)])
def test_animations_last_as_long_as_they_are_said_to(
    tmp_path: Path, suffix: str, rate: float | None, fps: float | None, lasts: int
) -> None:
    (file,) = slipcast.save(made("frames", pictures(frames()), rate=rate), tmp_path / f"x{suffix}", fps=fps)
    total, near = 0.0, []
    with Image.open(file) as animation:
        assert animation.n_frames == COUNT
        for at in range(COUNT):
            animation.seek(at)
            near.append(np.abs(np.asarray(animation.convert("RGB")) / 255 - frames()[at]).max())
            total += animation.info["duration"]
    assert total == pytest.approx(lasts, abs=COUNT)  # APNG's durations are read as milliseconds
    assert max(near) < {".png": 0.003, ".webp": 0.2, ".gif": 0.3}[suffix]


def test_mp4(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    from imageio_ffmpeg import read_frames

    (file,) = slipcast.save(made("frames", frames(), rate=24.0), tmp_path / "x.mp4")
    reader = read_frames(str(file), output_params=["-vf", "scale=in_color_matrix=bt709"])
    about = next(reader)
    assert (about["fps"], about["size"], about["codec"]) == (24, (WIDTH, HEIGHT + 1), "h264")
    shown = np.stack([np.frombuffer(each, np.uint8).reshape(HEIGHT + 1, WIDTH, 3) for each in reader])
    assert len(shown) == COUNT
    assert np.abs(shown[:, :HEIGHT] / 255 - frames()).mean() < 0.01


def test_mp4_needs_what_may_not_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(HostError, match="imageio-ffmpeg is not installed") as refused:
        slipcast.save(made("frames", pictures(frames())), tmp_path / "x.mp4")
    assert refused.value.hint and "pip install 'slipcast[video]'" in refused.value.hint


def test_a_directory_has_frames(tmp_path: Path) -> None:
    files = slipcast.save(made("frames", pictures(frames()), pictures(frames(0.5))), tmp_path / "out")
    assert [file.name for file in files] == [f"{seed}-{at:04}.png" for seed in (7, 8) for at in range(COUNT)]
    with Image.open(tmp_path / "out" / "8-0002.png") as frame:
        assert np.abs(np.asarray(frame) / 255 - frames(0.5)[2]).max() < 0.003


def test_sounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard = np.sin(np.arange(800, dtype=np.float32)).reshape(2, 400)
    assert [file.name for file in slipcast.save(made("audio", heard, heard, rate=16000.0), tmp_path / "x.wav")] == [
        "x-7.wav", "x-8.wav"
    ]  # fmt: skip
    with wave.open(str(tmp_path / "x-8.wav")) as file:
        assert file.getparams()[:4] == (2, 2, 16000, 400)
        found = np.frombuffer(file.readframes(400), "<i2").reshape(400, 2).T / 32767
    assert np.abs(found - heard).max() < 1e-4 and not caplog.records
    slipcast.save(made("audio", 2 * heard, rate=16000.0), tmp_path / "x.wav")
    assert "the sound is clipped" in caplog.text
    (file,) = slipcast.save(made("audio", 2 * heard, rate=16000.0), tmp_path / "x.npz")
    with np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["0000"], 2 * heard)


@pytest.mark.parametrize(
    ("path", "count", "names"),
    [
        ("x.png", 1, ["x.png", "x.wav"]),
        ("x.gif", 2, ["x-7.gif", "x-8.gif", "x-7.wav", "x-8.wav"]),
        ("out", 1, [*(f"7-{at:04}.png" for at in range(COUNT)), "7.wav"]),
        ("x.mp4", 2, ["x-7.mp4", "x-8.mp4"]),
    ],
)
def test_videos_with_sound(tmp_path: Path, path: str, count: int, names: list[str]) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    heard = np.sin(np.arange(16000, dtype=np.float32) / 20).reshape(2, 8000)
    output = replace(made("frames", *[frames()] * count, rate=24.0), sounds=(heard,) * count, sound_rate=32000.0)
    files = slipcast.save(output, tmp_path / path)
    assert [file.name for file in files] == names
    if path.endswith(".mp4"):
        assert next(imageio_ffmpeg.read_frames(str(files[0])))["audio_codec"] == "aac"
        return
    with wave.open(str(files[-1])) as file:
        assert file.getparams()[:4] == (2, 2, 32000, 8000)


def test_pictures_as_arrays_are_pictures(tmp_path: Path) -> None:
    (file,) = slipcast.save(made("image", *frames()[:2]), tmp_path / "x.png")
    with Image.open(file) as grid:
        assert grid.size == (2 * WIDTH + 2, HEIGHT)


@pytest.mark.parametrize(
    ("kind", "suffix"), [("image", ".wav"), ("frames", ".jpg"), ("audio", ".mp3"), ("array", ".png")]
)
def test_other_forms_are_refused(tmp_path: Path, kind: Any, suffix: str) -> None:
    with pytest.raises(RequestError, match="have no such format") as refused:
        slipcast.save(made(kind, np.zeros((2, 4)), rate=1.0), tmp_path / f"x{suffix}")
    assert {"image": ".jpg", "frames": ".mp4", "audio": ".wav", "array": ".npz"}[kind] in str(refused.value.expected)
