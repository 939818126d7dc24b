"""Results as the bytes of a file: animations, videos, sounds and arrays."""

from __future__ import annotations

import importlib.util
import io
import logging
import tempfile
import wave
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slipcast.errors import HostError

logger = logging.getLogger("slipcast")

Encode = Callable[[Any, float], bytes]  # a result, and how many frames, or samples, a second has

NO_VIDEO = "cannot write MP4: imageio-ffmpeg is not installed"
INSTALL_VIDEO = "pip install 'slipcast[video]', or write .webp, .gif or .png"


def picture(image: Image.Image, form: str) -> bytes:
    """`form`: as Pillow calls it. OSError or ValueError where it has no such pictures."""
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def animated(form: str, unit_ms: int = 1) -> Encode:
    """Of frames in a format of Pillow's, in which a frame lasts a number of units; without end."""

    def encode(frames: Sequence[Image.Image], rate: float) -> bytes:
        data, begins = io.BytesIO(), [round(1000 / unit_ms * at / rate) for at in range(len(frames) + 1)]
        lasting = [unit_ms * (end - begin) for begin, end in pairwise(begins)]
        several: dict[str, Any] = {"append_images": frames[1:], "duration": lasting} if len(frames) > 1 else {}
        frames[0].save(data, form, save_all=True, loop=0, **several)
        return data.getvalue()

    return encode


def video(frames: Sequence[Image.Image], rate: float, track: bytes | None = None) -> bytes:
    """H.264 in MP4, hardly to be told from the frames, by ffmpeg; with the sound of `track`, a WAV file, as AAC. An odd
    side gets its last line twice.

    HostError where there is no ffmpeg, or where it fails.
    """
    check_video()
    from imageio_ffmpeg import write_frames

    levels = [np.asarray(frame.convert("RGB")) for frame in frames]
    height, width, _ = levels[0].shape
    odd = (0, height % 2), (0, width % 2), (0, 0)
    tagged = [f"-color{part}" for part in ("space", "_primaries", "_trc")]
    colours = ["-vf", "scale=out_color_matrix=bt709", *(each for tag in tagged for each in (tag, "bt709"))]
    with tempfile.TemporaryDirectory(prefix="slipcast-") as scratch:
        file = Path(scratch) / "video.mp4"
        size = width + width % 2, height + height % 2
        sounding: dict[str, str] = {}
        if track:
            (wav := file.with_suffix(".wav")).write_bytes(track)
            sounding = {"audio_path": str(wav), "audio_codec": "aac"}
        try:
            writer = write_frames(
                str(file), size, fps=rate, quality=7, macro_block_size=2, ffmpeg_log_level="error",
                output_params=[*colours, "-movflags", "+faststart"], **sounding,
            )  # fmt: skip
            writer.send(None)
            for each in levels:
                writer.send(np.pad(each, odd, mode="edge").tobytes())
            writer.close()
            return file.read_bytes()
        except (OSError, RuntimeError) as error:  # no program, or one that ended
            raise HostError("ffmpeg cannot write this video", got=str(error).strip().splitlines()[0]) from error


def check_video() -> None:
    """HostError where MP4 cannot be written."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise HostError(NO_VIDEO, hint=INSTALL_VIDEO)


def sound(samples: npt.NDArray[np.floating[Any]], rate: float) -> bytes:
    """float [channels, samples] or [samples] in [-1, 1] as 16-bit WAV; what is louder is clipped, and said."""
    channels = np.atleast_2d(samples)
    if (loudest := float(np.abs(channels).max(initial=0))) > 1:
        logger.warning("the sound is clipped: it reaches %.3g, where 1 is the loudest; .npz keeps it", loudest)
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(round(rate))
        file.writeframes((np.clip(channels.T, -1, 1) * 32767).round().astype("<i2").tobytes())
    return data.getvalue()


def numbered(arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """Arrays by number."""
    data = io.BytesIO()
    np.savez(data, **{f"{number:04}": array for number, array in enumerate(arrays)})  # type: ignore[arg-type]
    return data.getvalue()
