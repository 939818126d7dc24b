"""Pictures of PIL that remember which tensor they are.

What counts is what a pipeline makes of PIL's pictures, as people give it: some take nothing else (FLUX.2's editing),
and some take a tensor for what their image processor would have made (FLUX's ControlNets). What PIL does to such a
picture is done to its tensor as well, by the same arithmetic: resize, crop, copy, convert, paste into another; and what
numpy does to its numbers, until they are a tensor. Where they are read in any other way, it has escaped.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from slipcast_compiler.capture.blocks import parameters_of
from slipcast_compiler.capture.pixels import Reading, remember, tensors_of_pixels
from slipcast_compiler.capture.resizing import as_pictures, reduce, resize
from slipcast_compiler.capture.where import here

_PIL = re.compile(r"\bImage\b|\bPipelineImageInput\b")  # in a type, or in its text
GREY = (19595, 38470, 7471)  # of PIL: weights of red, green, blue, of 65536
MODES = {1: "L", 3: "RGB"}
WHOLE = 1e-3  # of a level


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


class Picture(Image.Image):
    """`levels`: float32 [1, channels, height, width], whole numbers up to 255, which are those of the picture. `name`:
    of one that was given, and is as large as it was. `seen`: what is told of its uses. `followed`: while PIL does what
    is done to the levels too."""

    levels: torch.Tensor
    name: str | None = None
    seen: Seen | None = None
    followed: bool = False

    def load(self) -> Any:
        """PIL's own, through which all that reads or changes a picture's numbers goes."""
        if not self.followed and self.seen:
            self.seen.escaped.append(here())
        return super().load()

    def numbers(self, resized: tuple[int, int] | None = None) -> torch.Tensor:
        """Its levels, for a use that is noted."""
        if self.seen and self.name is not None:
            self.seen.uses.setdefault(self.name, set()).add(resized)
        return self.levels

    def made(self, picture: Image.Image, levels: torch.Tensor, same_size: bool = False) -> Picture:
        """Of this one, by PIL and by arithmetic."""
        return remembering(picture, levels, self.name if same_size else None, self.seen)

    def plain(self) -> Image.Image:
        """The same picture, without its memory."""
        with self.following():
            return super().copy()

    def resize(self, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None) -> Image.Image:
        kind = Image.Resampling(Image.Resampling.BICUBIC if resample is None else resample)
        factors = [1, 1]
        if reducing_gap is not None and kind != Image.Resampling.NEAREST:
            factors = [int(own / to / reducing_gap) or 1 for own, to in zip(self.size, size, strict=True)]
        if box is not None or any(own % factor for own, factor in zip(self.size, factors, strict=True)):
            return super().resize(size, resample, box, reducing_gap)
        with self.following():
            made = super().resize(size, kind, None, reducing_gap)
        if made.size == self.size:
            return self.made(made, self.levels, True)
        plainly_resized = kind == Image.Resampling.LANCZOS and factors == [1, 1]
        levels = reduce(self.numbers(made.size if plainly_resized else None), factors[1], factors[0])
        return self.made(made, resize(levels, (made.height, made.width), kind))

    def crop(self, box: Any = None) -> Image.Image:
        left, top, right, bottom = (round(side) for side in box or (0, 0, *self.size))
        if left < 0 or top < 0 or right > self.width or bottom > self.height:
            return super().crop(box)  # with what is not in the picture
        with self.following():
            made = super().crop(box)
        return self.made(made, self.numbers()[..., top:bottom, left:right])

    def thumbnail(self, size: Any, resample: Any = Image.Resampling.BICUBIC, reducing_gap: Any = 2.0) -> None:
        if self.seen:
            self.seen.escaped.append(here())
        super().thumbnail(size, resample, reducing_gap)

    def copy(self) -> Image.Image:
        return self.made(self.plain(), self.levels, True)

    def __copy__(self) -> Image.Image:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Image.Image:
        return self.copy()

    def convert(self, mode: str | None = None, *args: Any, **kwargs: Any) -> Image.Image:
        if mode == self.mode and not args and not kwargs:
            return self.copy()
        if (self.mode, mode) not in (("L", "RGB"), ("RGB", "L")) or args or kwargs:
            return super().convert(mode, *args, **kwargs)
        with self.following():
            made = super().convert(mode)
        if mode == "RGB":
            return self.made(made, self.levels.repeat(1, 3, 1, 1), True)
        weights = torch.tensor(GREY, dtype=torch.float32).reshape(1, 3, 1, 1)
        grey = (((self.levels * weights).sum(1, keepdim=True) + 0x8000) / 0x10000).floor()
        return self.made(made, grey, True)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Within it, whoever asks PIL for something does the same to the levels."""
        self.followed = True
        try:
            yield
        finally:
            self.followed = False


def remembering(
    picture: Image.Image, levels: torch.Tensor, name: str | None = None, seen: Seen | None = None
) -> Picture:
    """The same picture, which from here on is this tensor."""
    picture.__class__ = Picture
    found = cast(Picture, picture)
    found.levels, found.name, found.seen = levels, name, seen
    return found


def in_pil(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call, with pictures of PIL for those arguments that may be such, by their types. Several pictures in a
    tensor, and numbers that are no levels of 8 bits, stay as they are."""
    known = parameters_of(pipe)
    return {name: _in_pil(value, name) if _is_pil(known.get(name)) else value for name, value in call.items()}


def plainly(given: Mapping[str, Any]) -> dict[str, Any]:
    """What in_pil made of a call, with pictures that remember nothing."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value.plain() if isinstance(value, Picture) else value

    return {name: plain(value) for name, value in given.items()}


def rewinding(call: Mapping[str, Any]) -> Callable[[], None]:
    """What sets the call's generators, and torch's own, to where they are now."""
    found = [torch.default_generator, *(each for each in tree_leaves(dict(call)) if isinstance(each, torch.Generator))]
    states = [each.get_state() for each in found]

    def rewind() -> None:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)

    return rewind


def levels_of(picture: torch.Tensor) -> torch.Tensor:
    """Of float32 [1, channels, height, width] in [0, 1]: what a picture of PIL has of it."""
    return (picture * 255).round().clamp(0, 255)


@contextlib.contextmanager
def followed(given: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[Seen]:
    """Within it, pictures that in_pil made of a call are followed, through PIL and numpy, until they are tensors again.
    To be entered where operators on the call's tensors are seen."""
    seen, readings = Seen(), list[Reading]()
    for name, value in given.items():
        _follow(value, call[name], seen)
    array, asarray, paste = np.array, np.asarray, Image.Image.paste

    def read(usual: Any) -> Callable[..., Any]:
        def reading(value: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(value, Picture) or set(kwargs) - {"dtype", "copy"} or len(args) > 1:
                return usual(value, *args, **kwargs)
            readings.append(Reading(here()))
            levels = value.numbers()[0].permute(1, 2, 0).clone()
            pixels = remember(usual(value.plain()), levels[..., 0] if value.mode == "L" else levels, readings[-1])
            kind = args[0] if args else kwargs.get("dtype")
            return pixels if kind is None else pixels.astype(kind)

        return reading

    def pasted(self: Image.Image, im: Any, box: Any = None, mask: Any = None) -> None:
        corner = box is None or (isinstance(box, tuple | list) and len(box) == 2)
        if not isinstance(im, Picture) or mask is not None or im.mode != self.mode or not corner:
            paste(self, im, box, mask)
            return
        levels = self.numbers() if isinstance(self, Picture) else _levels_in(self)
        with self.following() if isinstance(self, Picture) else contextlib.nullcontext():
            paste(self, im.plain(), box)
        remembering(self, _with(levels, im.numbers(), *(box or (0, 0))), seen=seen)

    np.array, np.asarray, Image.Image.paste = read(array), read(asarray), pasted  # type: ignore[method-assign]
    try:
        with tensors_of_pixels():
            yield seen
        seen.escaped += [each.escaped or each.place for each in readings if each.escaped or not each.taken]
    finally:
        np.array, np.asarray, Image.Image.paste = array, asarray, paste  # type: ignore[method-assign]


def _is_pil(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and bool(_PIL.search(str(parameter.annotation)))


def _in_pil(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_in_pil(each, f"{name}[{at}]") for at, each in enumerate(value)]
    if not isinstance(value, torch.Tensor) or value.ndim != 4 or value.shape[0] != 1 or value.shape[1] not in MODES:
        return value
    levels = levels_of(value.detach())
    of_8_bits = bool(((value.detach() * 255 - levels).abs() <= WHOLE).all())
    return remembering(as_pictures(value)[0], levels, name) if of_8_bits else value


def _levels_in(picture: Image.Image) -> torch.Tensor:
    numbers = np.array(picture, np.float32).reshape(1, picture.height, picture.width, -1)
    return torch.from_numpy(numbers.transpose(0, 3, 1, 2).copy())


def _with(levels: torch.Tensor, other: torch.Tensor, left: int, top: int) -> torch.Tensor:
    """Levels with others in their place, as far as they are within."""
    (height, width), (rows, columns) = levels.shape[-2:], other.shape[-2:]
    first, last = max(top, 0), min(top + rows, height)
    begin, end = max(left, 0), min(left + columns, width)
    if first >= last or begin >= end:
        return levels
    part = other[..., first - top : last - top, begin - left : end - left]
    middle = torch.cat([levels[..., first:last, :begin], part, levels[..., first:last, end:]], dim=-1)
    return torch.cat([levels[..., :first, :], middle, levels[..., last:, :]], dim=-2)


def _follow(given: Any, value: Any, seen: Seen) -> None:
    if isinstance(given, list) and isinstance(value, Sequence):
        for each, one in zip(given, value, strict=True):
            _follow(each, one, seen)
    elif isinstance(given, Picture):
        given.levels, given.seen = levels_of(value), seen
