"""Pictures that a program takes, and those that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from slipcast.bundle.sources import ImageSource
from slipcast.errors import RequestError
from slipcast.run.base import to_pil

Floats = npt.NDArray[np.float32]
MODES = {1: "L", 3: "RGB"}
DEEP = ("I", "F")  # how modes begin that have more than 8 bits a channel, of which a conversion would clip most


def open_picture(file: Path) -> Image.Image:
    """A picture as diffusers' load_image reads it: turned as its EXIF says. RequestError where it is none."""
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{file} is no picture that can be read", got=str(error)) from None


def open_array(file: Path) -> npt.NDArray[Any]:
    """An array of a .npy file. RequestError where it is none."""
    try:
        array: npt.NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RequestError(f"{file} is no array that can be read", expected=".npy", got=str(error)) from None
    return array


def open_given(file: Path) -> Any:
    """A picture, or the array of a .npy file."""
    return open_array(file) if file.suffix.lower() == ".npy" else open_picture(file)


def fit_picture(name: str, picture: Image.Image, mode: str, size: tuple[int, int]) -> Image.Image:
    """A picture in a mode and of a size (width, height), as diffusers' image processor makes it: what is transparent is
    dropped, and Lanczos's filter resizes. RequestError for one of more than 8 bits."""
    if picture.mode.startswith(DEEP):
        raise RequestError(
            f"{name} is not usable", expected="a picture of 8 bits a channel", got=f"mode {picture.mode}"
        )
    converted = picture.convert(mode)
    return converted if converted.size == size else converted.resize(size, Image.Resampling.LANCZOS)


def read_picture(source: ImageSource, given: object) -> Floats:
    """A PIL image, resized by Lanczos's filter, or an array [h, w], [h, w, c] or [1, c, h, w], of uint8 or of floats in
    [0, 1], as float32 of the source's shape; of what is no picture, an array of that shape. RequestError for others."""
    if source.size is None:
        return _read_array(source, given)
    channels, height, width = source.size
    if isinstance(given, Image.Image):
        given = np.asarray(fit_picture(source.name, given, MODES[channels], (width, height)))
    array = given if isinstance(given, np.ndarray) else None
    if array is not None and array.ndim == 2:
        array = array[..., None]
    if array is not None and array.ndim == 3:
        array = array.transpose(2, 0, 1)[None]
    if array is None or array.shape != source.shape:
        raise _refuse(source, f"{type(given).__name__} {list(given.shape) if isinstance(given, np.ndarray) else ''}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array, np.float32) / np.float32(255)
    if array.dtype.kind != "f":
        raise _refuse(source, str(array.dtype))
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise _refuse(source, "numbers beyond [0, 1]")
    return np.ascontiguousarray(array, np.float32)


def _read_array(source: ImageSource, given: object) -> Floats:
    if not isinstance(given, np.ndarray) or given.shape != source.shape or given.dtype.kind != "f":
        raise _refuse(source, f"{type(given).__name__} {list(given.shape) if isinstance(given, np.ndarray) else ''}")
    if not np.isfinite(given).all():
        raise _refuse(source, "NaN or infinity")
    return np.ascontiguousarray(given, np.float32)


def _refuse(source: ImageSource, got: str) -> RequestError:
    expected = f"an array of floats {list(source.shape)}"
    if source.size:
        channels, height, width = source.size
        expected = f"a PIL image, or an array [{height}, {width}, {channels}] or {list(source.shape)} in [0, 1]"
    return RequestError(f"{source.name} is not usable", expected=expected, got=got.strip())


def as_levels(arrays: Sequence[Any]) -> list[Floats]:
    """Of [n, ..., channels, height, width], each of the n as float32 [..., height, width, channels] in [0, 1]."""
    return [np.clip(np.moveaxis(one, -3, -1), 0, 1).astype(np.float32, copy=False) for many in arrays for one in many]


def as_pil(levels: Floats) -> Any:
    """Of [h, w, c] a picture, of [frames, h, w, c] a list of them."""
    return to_pil(levels) if levels.ndim == 3 else [to_pil(frame) for frame in levels]
