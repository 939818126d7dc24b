"""Image processors as arithmetic: what they give for PIL's pictures, found by what they are told to do."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor, ViTImageProcessor

from slipcast_compiler.capture.processing import call_pipeline, pictures_in, process

TENSORS = {"return_tensors": "pt"}
GIVEN = {"do_rescale": False, "do_resize": False, "do_center_crop": False}
ROUNDING = 1e-3  # of all numbers, those that PIL rounds to the next level


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _process(processor: Any, args: Any, kwargs: Any) -> Any:
    return process(processor, processor, args, kwargs, _Nothing)


def _levels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, *shape), generator=torch.Generator().manual_seed(1))


PROCESSORS = [
    (CLIPImageProcessor(), {}),
    (CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 36}), {}),
    (CLIPImageProcessor(), {"do_center_crop": False}),
    (SiglipImageProcessor(size={"height": 30, "width": 44}), {}),
    (ViTImageProcessor(size={"height": 30, "width": 30}, resample=2), {}),
    (ViTImageProcessor(size={"height": 30, "width": 30}, resample=0, do_normalize=False), {}),
]


@pytest.mark.parametrize(("processor", "kwargs"), PROCESSORS)
@pytest.mark.parametrize("shape", [(64, 96), (120, 50), (24, 24)])
def test_it_gives_what_the_processor_makes_of_a_picture(processor: Any, kwargs: Any, shape: Any) -> None:
    levels = _levels(*shape)
    picture = Image.fromarray(levels[0].permute(1, 2, 0).to(torch.uint8).numpy())
    wanted = processor(images=picture, **kwargs, **TENSORS)["pixel_values"]
    given = {"images": levels / 255, **kwargs, **TENSORS}
    found = _process(processor, (), given)
    assert found is not None and found["pixel_values"].shape == wanted.shape
    apart = (found["pixel_values"] - wanted).abs()
    assert float(apart.max()) < 1.01 / 255 / min(processor.image_std if processor.do_normalize else [1])
    assert float((apart > 1e-5).float().mean()) <= ROUNDING


def test_a_processor_that_only_normalises_is_given_tensors() -> None:
    processor, x = CLIPImageProcessor(), _levels(24, 24) / 255
    found = _process(processor, (), {"images": x, **GIVEN, **TENSORS})
    assert found is not None
    assert torch.equal(found["pixel_values"], processor(images=x, **GIVEN, **TENSORS)["pixel_values"])


def test_a_processor_that_resizes_tensors_drops_what_is_between_levels() -> None:
    processor, x = SiglipImageProcessor(size={"height": 30, "width": 44}), torch.rand(1, 3, 40, 50)
    wanted = processor(images=x, do_rescale=False, **TENSORS)["pixel_values"]
    found = _process(processor, (), {"images": x, "do_rescale": False, **TENSORS})
    assert found is not None
    assert float(((found["pixel_values"] - wanted).abs() > 1e-5).float().mean()) <= ROUNDING


class Padding(CLIPImageProcessor):  # type: ignore[misc]
    do_pad = True


class Inverting(CLIPImageProcessor):  # type: ignore[misc]
    """Does what it is not told to do."""

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        return super().__call__([Image.fromarray(255 - np.asarray(image)) for image in images], **kwargs)


@pytest.mark.parametrize(
    ("processor", "kwargs"),
    [
        (Padding(), TENSORS),
        (Inverting(), TENSORS),
        (CLIPImageProcessor(), {}),
        (CLIPImageProcessor(crop_size=300), TENSORS),
    ],
)
def test_what_else_it_does_is_not_taken_for_arithmetic(processor: Any, kwargs: Any) -> None:
    assert _process(processor, (_levels(24, 24) / 255,), kwargs) is None


@pytest.mark.parametrize("images", ["a text", [_levels(8, 8), _levels(8, 8)], _levels(8, 8), torch.ones(1, 4, 8, 8)])
def test_what_is_no_picture(images: Any) -> None:
    assert pictures_in((images,), {}) is None


def test_a_processor_is_given_pictures_while_the_pipeline_is_asked() -> None:
    processor, levels = CLIPImageProcessor(), _levels(64, 96)
    picture = Image.fromarray(levels[0].permute(1, 2, 0).to(torch.uint8).numpy())
    wanted, call = processor(images=picture, **TENSORS), partial(processor, images=[(levels / 255)[0]], **TENSORS)

    class Pipe:
        components: ClassVar[dict[str, Any]] = {"image_processor": processor, "tokenizer": None}

        def __call__(self, image: Any) -> None:
            assert torch.equal(call()["pixel_values"], wanted["pixel_values"])
            assert torch.equal(processor.preprocess(images=image, **TENSORS)["pixel_values"], wanted["pixel_values"])

    call_pipeline(Pipe(), {"image": levels / 255})
    assert not torch.equal(call()["pixel_values"], wanted["pixel_values"])


def test_a_picture_beside_a_text_is_left_to_the_processor() -> None:
    assert pictures_in(("a text",), {"images": torch.ones(1, 3, 8, 8)}) is None
