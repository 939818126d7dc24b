"""Results on disk: pictures, animations and arrays, one file of all or one each."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from PIL import Image

from slipcast.cli.common import check_writable, is_directory, write_whole

Kind = Literal["image", "frames", "array"]
SUFFIXES: dict[Kind, str] = {"image": ".png", "frames": ".png", "array": ".npz"}  # animated PNG is lossless
FRAME_MS = 100  # of an animation


def check_output(output: Path, kind: Kind = "image") -> None:
    """UsageError, before the work, for what could not be saved after it; `save` meets what goes wrong nevertheless."""
    kinds, suffix = Image.registered_extensions(), output.suffix.lower()
    saves = Image.SAVE_ALL if kind == "frames" else Image.SAVE
    fits = suffix == ".npz" if kind == "array" else kinds.get(suffix) in saves
    if not is_directory(output) and not fits:
        what = {"image": "picture", "frames": "animation", "array": "array"}[kind]
        raise click.UsageError(
            f"cannot write {output}: no {what} format is called {output.suffix}; use {SUFFIXES[kind]}"
        )
    check_writable(output)


def save(results: Sequence[Any], seeds: Sequence[int], output: Path, kind: Kind = "image") -> list[Path]:
    """One file, of pictures a grid; or one each, named by seed, where `output` is a directory.

    A seed may have several results, one after another.
    """
    each = len(results) // len(seeds)
    if is_directory(output):
        names = [f"{seed}-{k}" if each > 1 else f"{seed}" for seed in seeds for k in range(each)]
        files = {output / f"{name}{SUFFIXES[kind]}": [one] for name, one in zip(names, results, strict=True)}
    elif kind == "frames" and len(results) > 1:
        raise click.UsageError(f"cannot write {output}: one file holds one animation; name a directory")
    else:
        files = {output: list(results)}
    for file, content in files.items():
        write_whole(file, _encode(content, file, kind))
    return list(files)


def _encode(content: list[Any], file: Path, kind: Kind) -> bytes:
    """A file's bytes: arrays by number, the frames of an animation, or pictures in a grid."""
    data = io.BytesIO()
    try:
        if kind == "array":
            np.savez(data, **{f"{number:04}": array for number, array in enumerate(content)})
        else:
            first, *others = content[0] if kind == "frames" else [make_grid(content)]
            options: dict[str, Any] = {"save_all": True, "append_images": others, "duration": FRAME_MS, "loop": 0}
            chosen = options if kind == "frames" else {}
            first.save(data, Image.registered_extensions()[file.suffix.lower()], **chosen)
    except (OSError, ValueError) as error:  # a format that has no such pictures
        raise click.UsageError(f"cannot write {file}: {error}") from None
    return data.getvalue()


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
