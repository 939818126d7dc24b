"""What a pipeline's image processor does, as arithmetic on tensors: resize, crop, rescale, normalise.

A picture that a call is given is a tensor in [0, 1], of 8 bits; a processor is meant for PIL's pictures. It is given
one of the same numbers, and what it makes of that is what counts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from slipcast_compiler.capture.pil import Picture, in_pil, plainly, rewinding
from slipcast_compiler.capture.resizing import as_pictures, resize

KNOWN = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}  # of what processors can do
PIXELS = "pixel_values"
ENTRIES = ("__call__", "preprocess")  # of a processor; a tokenizer has the first
SIZES = (("size", "do_resize"), ("crop_size", "do_center_crop"))
Unseen = Callable[[], contextlib.AbstractContextManager[None]]
CLOSE = 1e-3  # of the mean distance to what a processor gives; PIL may round single levels otherwise


@dataclass(frozen=True)
class Processing:
    """What an image processor is told to do. `size`: (height, width) or a shortest edge; `mean` and `std` by channel;
    `whole`: whether it is given pictures of PIL, whose levels it rescales."""

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whole: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of float32 [n, 3, height, width] in [0, 1]."""
        if self.size is not None:
            # Of tensors, processors take what is below; of pictures, tensors are near whole levels.
            levels = (x * 255 + 0.5 * self.whole).floor()
            x = resize(levels, self._resized(*x.shape[-2:]), self.resample) / 255
        if self.crop is not None:
            top, left = ((size - crop) // 2 for size, crop in zip(x.shape[-2:], self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(each).reshape(1, -1, 1, 1) for each in (self.mean, self.std))
        return (x - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            assert self.size is not None
            return self.size
        short, long = sorted((height, width))
        other = int(self.size * long / short)
        return (self.size, other) if height <= width else (other, self.size)


def find_processing(processor: Any, kwargs: Mapping[str, Any], channels: int) -> Processing | None:
    """What a processor that is called with these arguments is told to do; None where it does something else too."""

    def told(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(processor, name, None) if value is None else value

    steps = {name for name in (*dir(processor), *kwargs) if name.startswith("do_") and told(name)}
    if not steps or steps - KNOWN or kwargs.get("return_tensors") != "pt":
        return None
    size, crop = (told(name) if step in steps else None for name, step in SIZES)
    normal = "do_normalize" in steps
    mean, std = (
        _each(told(name) if normal else usual, channels) for name, usual in (("image_mean", 0), ("image_std", 1))
    )
    resized, cropped = _pair(size, "shortest_edge"), _pair(crop)
    if isinstance(cropped, int) or (size is not None and resized is None) or (crop is not None and cropped is None):
        return None
    return Processing(resized, int(told("resample") or 0), cropped, mean, std, "do_rescale" in steps)


def _pair(size: Any, edge: str = "") -> tuple[int, int] | int | None:
    """(height, width), or a shortest edge alone."""
    if isinstance(size, int):
        return size if edge else (size, size)
    found = dict(size) if size is not None else {}
    given = {name: value for name, value in found.items() if value is not None}
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    return given[edge] if given.keys() == {edge} else None


def _each(value: Any, channels: int) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * channels


def process(
    call: Callable[..., Any], processor: Any, args: Any, kwargs: Mapping[str, Any], unseen: Unseen
) -> Any | None:
    """What a processor that is called so gives, by arithmetic on the images; None where it does something else. Within
    `unseen` nothing is recorded."""
    remembers = any(isinstance(each, Picture) for each in tree_leaves([args, dict(kwargs)]))
    images, kwargs = pictures_in(args, kwargs), _besides(kwargs)
    found = find_processing(processor, kwargs, images.shape[1]) if images is not None else None
    if images is None or found is None or (remembers and not found.whole):
        return None
    with unseen():
        if not _agrees(call, images, kwargs, found):
            return None
        made = _of_pictures(call, images, kwargs, found)
    made[PIXELS] = found(images)
    return made


def _of_pictures(call: Callable[..., Any], images: torch.Tensor, kwargs: Mapping[str, Any], found: Processing) -> Any:
    return call(images=as_pictures(images) if found.whole else images, **kwargs)


def _agrees(call: Callable[..., Any], like: torch.Tensor, kwargs: Mapping[str, Any], found: Processing) -> bool:
    """Whether that is what the processor does, for a picture as large as these images."""
    picture = torch.rand(1, *like.shape[1:], generator=torch.Generator().manual_seed(0))
    picture = (picture * 255).round() / 255 if found.whole else picture
    try:
        made, own = _of_pictures(call, picture, kwargs, found), found(picture)
    except (ValueError, TypeError, RuntimeError):  # of sizes that do not go together, or of what is no picture
        return False
    pixels = made.get(PIXELS) if hasattr(made, "get") and len(made) == 1 else None
    if not isinstance(pixels, torch.Tensor) or pixels.shape != own.shape:
        return False
    return float((pixels - own).abs().mean()) <= CLOSE * float(pixels.abs().mean())


def _besides(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "images"}


def call_pipeline(pipe: Any, call: Mapping[str, Any]) -> Any:
    """pipe(**call), with pictures of PIL in place of tensors where it, or an image processor of its, is meant for
    those; with tensors where it fails with them."""
    with contextlib.ExitStack() as stack:
        for name, part in pipe.components.items():
            if is_processor(name, part):
                stack.enter_context(called_through(part, _with_pictures))
        given, rewind = in_pil(pipe, call), rewinding(call)
        try:
            return pipe(**plainly(given))
        except Exception as error:  # the pipeline's own code, which may fail in any way
            if all(given[name] is value for name, value in call.items()):
                raise
            rewind()
            try:
                return pipe(**call)
            except (TypeError, AttributeError, ValueError):  # it takes pictures alone, and fails for a reason
                raise error from None


def is_processor(name: str, part: Any) -> bool:
    """Whether a component reads pictures, by its name. One that makes pictures too works on tensors, as a pipeline's
    own code does, and is recorded like it."""
    named = "processor" in name or "extractor" in name
    return named and part is not None and not isinstance(part, nn.Module) and not hasattr(part, "postprocess")


def pictures_in(args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The images that a processor is called with, float32 [n, channels, height, width]; None where they are others."""
    given = [*args, *([kwargs["images"]] if "images" in kwargs else [])]
    images = given[0] if len(given) == 1 else None
    if isinstance(images, list | tuple) and len(images) == 1:
        images = images[0]
    if isinstance(images, Picture):
        images = images.numbers() / 255
    if not isinstance(images, torch.Tensor) or images.dtype != torch.float32 or images.ndim not in (3, 4):
        return None
    images = images if images.ndim == 4 else images[None]
    return images if images.shape[1] in (1, 3) else None


@contextlib.contextmanager
def called_through(part: Any, watch: Callable[[Callable[..., Any], Any, Any, dict[str, Any]], Any]) -> Iterator[None]:
    """Within it, a tokenizer or a processor is called through watch(method, part, args, kwargs)."""
    own = type(part)

    def through(name: str) -> Callable[..., Any]:
        method = getattr(own, name)
        return lambda this, *args, **kwargs: watch(functools.partial(method, this), this, args, kwargs)

    methods = {name: through(name) for name in ENTRIES if hasattr(own, name)}
    part.__class__ = type(own.__name__, (own,), {**methods, "__module__": own.__module__})
    try:
        yield
    finally:
        part.__class__ = own


def _with_pictures(call: Callable[..., Any], part: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    images, besides = pictures_in(args, kwargs), _besides(kwargs)
    found = find_processing(part, besides, images.shape[1]) if images is not None else None
    return call(*args, **kwargs) if images is None or found is None else _of_pictures(call, images, besides, found)
