"""Results on disk: the suffix says in what form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slipcast.bundle.program import Output
from slipcast.errors import RequestError
from slipcast.run.base import PipelineOutput, to_pil
from slipcast.run.encoding import Encode, animated, check_video, numbered, picture, sound, video
from slipcast.run.writing import check_writable, is_directory, write_whole

USUAL: dict[Output, str] = {
    "image": ".png",
    "frames": ".png",
    "audio": ".wav",
    "array": ".npz",
}  # all but .wav lossless
FPS = 10.0  # of a video whose pipeline has no say in it, as in diffusers' export_to_video
# Formats of which a file holds one result. Images are in any format of Pillow's, arrays in .npz, in one file of all.
SINGLE: dict[Output, Mapping[str, Encode]] = {
    "frames": {".png": animated("PNG"), ".webp": animated("WEBP"), ".gif": animated("GIF", 10), ".mp4": video},
    "audio": {".wav": sound},
}
MOST_FPS = 1000.0


def save(output: PipelineOutput, path: str | Path, *, fps: float | None = None) -> list[Path]:
    """Write what a pipeline gave, in the form that the path's suffix says; returns the files.

    Images: any format of Pillow's; several are one grid. Videos: .png, .webp or .gif, animated, or .mp4, which needs
    `slipcast[video]`; at `fps` frames a second, by default the pipeline's own number, or else 10. Sounds: .wav, in 16
    bits; or .npz, as arrays are. Several videos or sounds are a file each, with the seed in its name. A directory, or a
    path without a suffix, holds a file each, called by its seed; of a video, its frames as PNG: SEED-0000.png. The
    sound of a video is in its .mp4; beside other files it is a .wav.

    RequestError for another suffix, and for what cannot be written; HostError where .mp4 needs what is not installed.
    """
    path, kind = Path(path), output.kind
    check_output(path, kind, fps)
    rate = float(fps or output.rate or FPS)
    results = [_drawable(one, kind) for one in output.images]
    sounds = _sounds(path, output)
    made = []
    for file, content in _files(path, kind, output.seeds, results).items():
        encode = partial(video, track=sounds.pop(file.with_suffix(".wav"))) if _has_track(file, sounds) else None
        write_whole(file, encode(content, rate) if encode else _encode(content, file, kind, rate))
        made.append(file)
    for file, content in sounds.items():
        write_whole(file, content)
        made.append(file)
    return made


def _sounds(path: Path, output: PipelineOutput) -> dict[Path, bytes]:
    """Beside each video, its sound."""
    if not output.sounds or not output.sound_rate:
        return {}
    folder = is_directory(path)
    tracks = _files(path if folder else path.with_suffix(".wav"), "audio", output.seeds, output.sounds)
    return {file: sound(samples, output.sound_rate) for file, samples in tracks.items()}


def _has_track(file: Path, sounds: Mapping[Path, bytes]) -> bool:
    """Whether a video's file holds its sound: .mp4 alone can."""
    return file.suffix.lower() == ".mp4" and file.with_suffix(".wav") in sounds


def check_output(path: Path, kind: Output = "image", fps: float | None = None) -> None:
    """RequestError or HostError, before the work, for what could not be saved after it."""
    if fps is not None and not (kind == "frames" and 0 < fps <= MOST_FPS):
        usable = f"above 0, at most {MOST_FPS:g}" if kind == "frames" else "none: this bundle gives no video"
        raise RequestError("fps is not usable", expected=usable, got=fps)
    suffix = path.suffix.lower()
    if not is_directory(path):
        legal = legal_suffixes(kind)
        if suffix not in legal:
            what = {"image": "pictures", "frames": "videos", "audio": "sounds", "array": "arrays"}[kind]
            shown = ", ".join(legal) if kind != "image" else ".png, .jpg, .webp and others of Pillow's"
            expected = f"{shown}; or a directory"
            raise RequestError(f"cannot write {path}: {what} have no such format", expected=expected, got=suffix)
        if suffix == ".mp4" and kind == "frames":
            check_video()
    check_writable(path)


def legal_suffixes(kind: Output) -> list[str]:
    """Of files that such results can be written to."""
    if kind == "image":
        return [end for end, form in Image.registered_extensions().items() if form in Image.SAVE]
    return [*SINGLE.get(kind, ()), *([".npz"] if kind != "frames" else [])]


def usual_path(name: str, output: PipelineOutput) -> Path:
    """Where a result goes that nobody gave a place."""
    several_files = output.kind in SINGLE and len(output.images) > 1
    return Path(f"{name}{USUAL[output.kind]}" if several_files else f"{name}-{output.seeds[0]}{USUAL[output.kind]}")


def _drawable(one: Any, kind: Output) -> Any:
    """A result with its pictures as Pillow's; arrays and sounds as they are."""
    if kind == "image":
        return to_pil(one) if isinstance(one, np.ndarray) else one
    return [to_pil(each) if isinstance(each, np.ndarray) else each for each in one] if kind == "frames" else one


def _files(path: Path, kind: Output, seeds: Sequence[int], results: Sequence[Any]) -> dict[Path, Any]:
    """What goes into each file. A seed may have several results, one after another."""
    each = len(results) // len(seeds)
    names = [f"{seed}-{k}" if each > 1 else f"{seed}" for seed in seeds for k in range(each)]
    named = list(zip(names, results, strict=True))
    if not is_directory(path):
        if path.suffix.lower() not in SINGLE.get(kind, {}):
            return {path: results}
        return {path.with_stem(f"{path.stem}-{name}") if len(named) > 1 else path: one for name, one in named}
    if kind == "frames":
        return {path / f"{name}-{at:04}.png": frame for name, frames in named for at, frame in enumerate(frames)}
    return {path / f"{name}{USUAL[kind]}": one if kind in SINGLE else [one] for name, one in named}


def _encode(content: Any, file: Path, kind: Output, rate: float) -> bytes:
    """A file's bytes."""
    suffix = file.suffix.lower()
    try:
        if isinstance(content, Image.Image):  # a frame
            return picture(content, "PNG")
        if encode := SINGLE.get(kind, {}).get(suffix):
            return encode(content, rate)
        return numbered(content) if suffix == ".npz" else picture(make_grid(content), _form(suffix))
    except (OSError, ValueError) as error:  # a format that has no such pictures
        raise RequestError(f"cannot write {file}: {error}") from None


def _form(suffix: str) -> str:
    return Image.registered_extensions()[suffix]


def make_grid(images: Sequence[Image.Image], gap: int = 2) -> Image.Image:
    """Pictures of one size, row by row, in as square a grid as their number allows; a single one stays as it is."""
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid
