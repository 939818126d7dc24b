"""Pictures of PIL that remember which tensor they are, for pipelines that take no tensors (FLUX.2's editing).

What PIL does to such a picture is done to its tensor as well, by the same arithmetic: resize, crop, copy, convert. What
is done to it in any other way gives a plain picture, which is a constant of the program; verification on another
picture refuses that.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from slipcast_compiler.capture.blocks import parameters_of
from slipcast_compiler.capture.resizing import as_pictures, resize

GREY = (19595, 38470, 7471)  # of PIL: weights of red, green, blue, of 65536
MODES = {1: "L", 3: "RGB"}


class Picture(Image.Image):
    """`levels`: float32 [1, channels, height, width], whole numbers up to 255, which are those of the picture."""

    levels: torch.Tensor

    def resize(self, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None) -> Image.Image:
        made = super().resize(size, resample, box, reducing_gap)
        if box is not None or reducing_gap is not None:
            return made
        kind = Image.Resampling.BICUBIC if resample is None else resample
        return remembering(made, resize(self.levels, (made.height, made.width), int(kind)))

    def crop(self, box: Any = None) -> Image.Image:
        made = super().crop(box)
        left, top, right, bottom = (round(side) for side in box or (0, 0, *self.size))
        if left < 0 or top < 0 or right > self.width or bottom > self.height:
            return made  # with what is not in the picture
        return remembering(made, self.levels[..., top:bottom, left:right])

    def copy(self) -> Image.Image:
        return remembering(super().copy(), self.levels)

    def convert(self, mode: str | None = None, *args: Any, **kwargs: Any) -> Image.Image:
        made = super().convert(mode, *args, **kwargs)
        if args or kwargs or made.mode == self.mode:
            return made if args or kwargs else remembering(made, self.levels)
        if (self.mode, made.mode) == ("L", "RGB"):
            return remembering(made, self.levels.repeat(1, 3, 1, 1))
        if (self.mode, made.mode) == ("RGB", "L"):
            weights = torch.tensor(GREY, dtype=torch.float32).reshape(1, 3, 1, 1)
            return remembering(made, (((self.levels * weights).sum(1, keepdim=True) + 0x8000) / 0x10000).floor())
        return made


class _Pixels(np.ndarray[Any, np.dtype[np.float32]]):
    """float32 [n, height, width, channels] in [0, 1] of pictures that remember their tensors: these, as `tensor`."""

    tensor: torch.Tensor


def remembering(picture: Image.Image, levels: torch.Tensor) -> Picture:
    """The same picture, which from here on is this tensor."""
    picture.__class__ = Picture
    found = cast(Picture, picture)
    found.levels = levels
    return found


def in_pil(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call, with pictures of PIL for those arguments that take nothing else, by their types."""
    known = parameters_of(pipe)
    return {name: _in_pil(value) if _is_pil(known.get(name)) else value for name, value in call.items()}


def levels_of(picture: torch.Tensor) -> torch.Tensor:
    """Of float32 [1, channels, height, width] in [0, 1]: what a picture of PIL has of it."""
    return (picture * 255).round().clamp(0, 255)


@contextlib.contextmanager
def followed(given: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[None]:
    """Within it, pictures that in_pil made of a call are followed into diffusers' image processors. To be entered where
    operators on the call's tensors are seen."""
    from diffusers.image_processor import VaeImageProcessor as Processor

    for name, value in given.items():
        _follow(value, call[name])
    to_numpy, to_tensor = Processor.pil_to_numpy, Processor.numpy_to_pt

    def pil_to_numpy(images: Any) -> Any:
        several, made = images if isinstance(images, list) else [images], to_numpy(images)
        if not all(isinstance(each, Picture) for each in several):
            return made
        pixels: _Pixels = made.view(_Pixels)
        pixels.tensor = torch.cat([each.levels / 255 for each in several])
        return pixels

    def numpy_to_pt(images: Any) -> Any:
        return images.tensor if isinstance(images, _Pixels) else to_tensor(images)

    Processor.pil_to_numpy, Processor.numpy_to_pt = staticmethod(pil_to_numpy), staticmethod(numpy_to_pt)
    try:
        yield
    finally:
        Processor.pil_to_numpy, Processor.numpy_to_pt = staticmethod(to_numpy), staticmethod(to_tensor)


def _is_pil(parameter: inspect.Parameter | None) -> bool:
    kind = str(parameter.annotation) if parameter else ""
    return "PIL." in kind and "Tensor" not in kind


def _in_pil(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_pil(each) for each in value]
    is_one = isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[0] == 1 and value.shape[1] in MODES
    return remembering(as_pictures(value)[0], levels_of(value.detach())) if is_one else value


def _follow(given: Any, value: Any) -> None:
    if isinstance(given, list) and isinstance(value, Sequence):
        for each, one in zip(given, value, strict=True):
            _follow(each, one)
    elif isinstance(given, Picture):
        given.levels = levels_of(value)
