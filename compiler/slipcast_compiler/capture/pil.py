"""Pictures of PIL that remember which tensor they are.

What counts is what a pipeline makes of PIL's pictures, as people give it: some take nothing else (FLUX.2's editing),
and some take a tensor for what their image processor would have made (FLUX's ControlNets). What PIL does to such a
picture is done to its tensor as well, by the same arithmetic: resize, crop, copy, convert; and so it comes to
diffusers' image processors. Where its numbers are read in any other way, it has escaped.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from slipcast_compiler.capture.blocks import parameters_of
from slipcast_compiler.capture.resizing import as_pictures, resize
from slipcast_compiler.capture.where import here

_PIL = re.compile(r"\bImage\b|\bPipelineImageInput\b")  # in a type, or in its text
GREY = (19595, 38470, 7471)  # of PIL: weights of red, green, blue, of 65536
MODES = {1: "L", 3: "RGB"}


@dataclass
class Seen:
    """What became of pictures. `escaped`: where numbers were read that are not followed; `uses`: by picture (see
    pictures_of), the (width, height) that it was resized to by Lanczos's filter, and None for any other use."""

    escaped: list[str] = field(default_factory=list)
    uses: dict[str, set[tuple[int, int] | None]] = field(default_factory=dict)

    @property
    def resized(self) -> dict[str, tuple[int, int]]:
        """The size of each picture of which nothing is used but what it was resized to."""
        only = {name: next(iter(uses)) for name, uses in self.uses.items() if len(uses) == 1}
        return {name: size for name, size in only.items() if size is not None}


_SEEN: ContextVar[Seen | None] = ContextVar("_SEEN", default=None)


class Picture(Image.Image):
    """`levels`: float32 [1, channels, height, width], whole numbers up to 255, which are those of the picture. `name`:
    of one that was given, and is as large as it was."""

    levels: torch.Tensor
    name: str | None = None

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if (seen := _SEEN.get()) is not None:
            seen.escaped.append(here())
        return cast(dict[str, Any], super().__array_interface__)

    def numbers(self, resized: tuple[int, int] | None = None) -> torch.Tensor:
        """Its levels, for a use that is noted."""
        if self.name is not None and (seen := _SEEN.get()) is not None:
            seen.uses.setdefault(self.name, set()).add(resized)
        return self.levels

    def plain(self) -> Image.Image:
        """The same picture, without its memory."""
        return super().copy()

    def resize(self, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None) -> Image.Image:
        made = super().resize(size, resample, box, reducing_gap)
        if box is not None or reducing_gap is not None:
            return made
        kind = Image.Resampling(Image.Resampling.BICUBIC if resample is None else resample)
        if made.size == self.size:
            return remembering(made, self.levels, self.name)
        levels = self.numbers(made.size if kind == Image.Resampling.LANCZOS else None)
        return remembering(made, resize(levels, (made.height, made.width), kind))

    def crop(self, box: Any = None) -> Image.Image:
        made = super().crop(box)
        left, top, right, bottom = (round(side) for side in box or (0, 0, *self.size))
        if left < 0 or top < 0 or right > self.width or bottom > self.height:
            return made  # with what is not in the picture
        return remembering(made, self.numbers()[..., top:bottom, left:right])

    def copy(self) -> Image.Image:
        return remembering(super().copy(), self.levels, self.name)

    def convert(self, mode: str | None = None, *args: Any, **kwargs: Any) -> Image.Image:
        made = super().convert(mode, *args, **kwargs)
        if args or kwargs:
            return made
        if made.mode == self.mode:
            return remembering(made, self.levels, self.name)
        if (self.mode, made.mode) == ("L", "RGB"):
            return remembering(made, self.levels.repeat(1, 3, 1, 1), self.name)
        if (self.mode, made.mode) == ("RGB", "L"):
            weights = torch.tensor(GREY, dtype=torch.float32).reshape(1, 3, 1, 1)
            grey = (((self.levels * weights).sum(1, keepdim=True) + 0x8000) / 0x10000).floor()
            return remembering(made, grey, self.name)
        return made


class _Pixels(np.ndarray[Any, np.dtype[np.float32]]):
    """float32 [n, height, width, channels] in [0, 1] of pictures that remember their tensors: these, as `tensor`."""

    tensor: torch.Tensor


def remembering(picture: Image.Image, levels: torch.Tensor, name: str | None = None) -> Picture:
    """The same picture, which from here on is this tensor."""
    picture.__class__ = Picture
    found = cast(Picture, picture)
    found.levels, found.name = levels, name
    return found


def in_pil(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call, with pictures of PIL for those arguments that may be such, by their types. Numbers beyond [0, 1], and
    several pictures in a tensor, stay as they are."""
    known = parameters_of(pipe)
    return {name: _in_pil(value, name) if _is_pil(known.get(name)) else value for name, value in call.items()}


def levels_of(picture: torch.Tensor) -> torch.Tensor:
    """Of float32 [1, channels, height, width] in [0, 1]: what a picture of PIL has of it."""
    return (picture * 255).round().clamp(0, 255)


@contextlib.contextmanager
def followed(given: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[Seen]:
    """Within it, pictures that in_pil made of a call are followed into diffusers' image processors. To be entered where
    operators on the call's tensors are seen."""
    from diffusers.image_processor import VaeImageProcessor as Processor

    for name, value in given.items():
        _follow(value, call[name])
    to_numpy, to_tensor = Processor.pil_to_numpy, Processor.numpy_to_pt

    def pil_to_numpy(images: Any) -> Any:
        several = images if isinstance(images, list) else [images]
        if not all(isinstance(each, Picture) for each in several):
            return to_numpy(images)
        pixels: _Pixels = to_numpy([each.plain() for each in several]).view(_Pixels)
        pixels.tensor = torch.cat([each.numbers() / 255 for each in several])
        return pixels

    def numpy_to_pt(images: Any) -> Any:
        return images.tensor if isinstance(images, _Pixels) else to_tensor(images)

    Processor.pil_to_numpy, Processor.numpy_to_pt = staticmethod(pil_to_numpy), staticmethod(numpy_to_pt)
    seen = Seen()
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)
        Processor.pil_to_numpy, Processor.numpy_to_pt = staticmethod(to_numpy), staticmethod(to_tensor)


def _is_pil(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and bool(_PIL.search(str(parameter.annotation)))


def _in_pil(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_in_pil(each, f"{name}[{at}]") for at, each in enumerate(value)]
    if not isinstance(value, torch.Tensor) or value.ndim != 4 or value.shape[0] != 1 or value.shape[1] not in MODES:
        return value
    within = bool(value.min() >= 0 and value.max() <= 1)
    return remembering(as_pictures(value)[0], levels_of(value.detach()), name) if within else value


def _follow(given: Any, value: Any) -> None:
    if isinstance(given, list) and isinstance(value, Sequence):
        for each, one in zip(given, value, strict=True):
            _follow(each, one)
    elif isinstance(given, Picture):
        given.levels = levels_of(value)
