"""Pictures of PIL that are followed: their tensors are what they are, whatever is done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from test_refusals import Denoiser, Plain

from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.find import find
from slipcast_compiler.capture.pil import Picture, Seen, followed, in_pil
from slipcast_compiler.capture.processing import call_pipeline
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.verify import verify

LANCZOS = Image.Resampling.LANCZOS
FOLLOWED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "copy": lambda image: image.copy(),
    "crop": lambda image: image.crop((3, 5, 20, 21)),
    "grey": lambda image: image.convert("L"),
    "grey and back": lambda image: image.convert("L").convert("RGB"),
    "smaller": lambda image: image.resize((17, 11), LANCZOS),
    "larger, cut": lambda image: image.resize((80, 60), Image.Resampling.BILINEAR).crop((8, 8, 72, 56)),
    "by its default": lambda image: image.resize((30, 30)),
    "nearest": lambda image: image.resize((21, 13), Image.Resampling.NEAREST),
}
ESCAPING: dict[str, Callable[[Image.Image], Image.Image]] = {
    "turned": lambda image: image.rotate(90),
    "beyond its sides": lambda image: image.crop((-2, 0, 10, 10)),
    "of a box": lambda image: image.resize((8, 8), LANCZOS, box=(0, 0, 10, 10)),
    "in another space": lambda image: image.convert("HSV"),
}


class Editing(Plain):
    """Adds to its latent what it makes of a picture."""

    processor = VaeImageProcessor(vae_scale_factor=4)
    make: Callable[[Any, Any], torch.Tensor]

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, image: Image.Image, num_inference_steps: int = 3, generator: Any = None
    ) -> Any:
        seen = type(self).make(self, image)
        return {"x": super().__call__(num_inference_steps, generator)["x"] + seen.mean(dim=(1, 2))[0, :2]}


def editing(make: Callable[[Any, Any], torch.Tensor]) -> Any:
    kind = type("Editing", (Editing,), {"make": make})
    return kind(Denoiser(), DDIMScheduler())


def both(image: Any) -> list[Any]:
    return [image.resize((24, 16), LANCZOS), image.crop((0, 8, 24, 24))]


def picture(height: int = 24, width: int = 36, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (1, channels, height, width), generator=torch.Generator().manual_seed(0)).float() / 255


def followed_in(image: torch.Tensor) -> Picture:
    found = in_pil(editing(lambda pipe, image: image), {"image": image})["image"]
    assert isinstance(found, Picture)
    return found


@pytest.mark.parametrize("done", FOLLOWED.values(), ids=FOLLOWED)
def test_its_tensor_is_what_it_is(done: Callable[[Image.Image], Image.Image]) -> None:
    made = done(followed_in(picture()))
    assert isinstance(made, Picture)
    wanted = np.array(made.plain(), np.float32).reshape(made.height, made.width, -1).transpose(2, 0, 1)[None]
    apart = np.abs(made.levels.numpy() - wanted)
    assert apart.max() <= 1 and (apart > 0).mean() < 3e-4


@pytest.mark.parametrize("done", ESCAPING.values(), ids=ESCAPING)
def test_what_is_not_followed_is_plain(done: Callable[[Image.Image], Image.Image]) -> None:
    assert not isinstance(done(followed_in(picture())), Picture)


def test_arrays_beyond_what_pictures_are_stay_as_they_are() -> None:
    pipe = editing(lambda pipe, image: image)
    for array in (picture() * 2, picture().repeat(2, 1, 1, 1), picture(channels=4), torch.ones(1, 8)):
        assert in_pil(pipe, {"image": array})["image"] is array


@pytest.mark.parametrize(
    ("make", "resized"),
    [
        (lambda pipe, image: pipe.processor.preprocess(image, 16, 24), {"image": (24, 16)}),
        (lambda pipe, image: pipe.processor.preprocess(image.convert("L").convert("RGB"), 16, 24), {"image": (24, 16)}),
        (lambda pipe, image: pipe.processor.preprocess(image), {}),
        (lambda pipe, image: pipe.processor.preprocess(image.resize((24, 16)), 16, 24), {}),
        (
            lambda pipe, image: pipe.processor.preprocess(
                [image.resize((24, 16), LANCZOS), image.crop((0, 0, 24, 16))]
            ),
            {},
        ),
    ],
)
def test_the_size_that_it_is_resized_to(make: Any, resized: dict[str, tuple[int, int]]) -> None:
    pipe, call = editing(make), {"image": picture()}
    program = capture(pipe, make_call(pipe, call))
    assert program.resized == resized
    assert [source.kind for source in program.needed_sources if source.kind == "image"] == ["image"]
    again = [make_call(pipe, {"image": call["image"].flip(-1)}, seed=5) for _ in range(2)]
    assert verify(find(pipe, call).program, pipe, *again).holds


def test_one_whose_numbers_are_read_is_given_as_a_tensor() -> None:
    """Where the pipeline takes that; its numbers are those of the picture."""

    def make(pipe: Any, image: Any) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return image * 255
        return torch.from_numpy(np.array(image).astype(np.float32)).permute(2, 0, 1)[None]

    pipe, call = editing(make), {"image": picture()}
    again = [make_call(pipe, {"image": call["image"].flip(-1)}, seed=5) for _ in range(2)]
    assert verify(find(pipe, call).program, pipe, *again).holds


def test_one_that_is_read_and_not_followed_is_no_part_of_a_program() -> None:
    def make(pipe: Any, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(image).astype(np.float32)).permute(2, 0, 1)[None]

    pipe, call = editing(make), {"image": picture()}
    again = [make_call(pipe, {"image": call["image"].flip(-1)}, seed=5) for _ in range(2)]
    assert not verify(find(pipe, call).program, pipe, *again).holds


def test_a_pipeline_that_takes_tensors_alone_is_given_them() -> None:
    def make(pipe: Any, image: Any) -> torch.Tensor:
        if not isinstance(image, torch.Tensor):
            raise TypeError("no tensor")
        return image + torch.rand(1, generator=torch.Generator().manual_seed(0))

    pipe, call = editing(make), {"image": picture()}
    given = [make_call(pipe, call, seed=5) for _ in range(2)]
    assert torch.equal(call_pipeline(pipe, given[0])["x"], pipe(**given[1])["x"])
    assert capture(pipe, make_call(pipe, call)).resized == {}


def test_where_numbers_escape_is_told() -> None:
    call = {"image": picture()}
    given = in_pil(editing(lambda pipe, image: image), call)
    with followed(given, call) as seen:
        np.array(given["image"])
        VaeImageProcessor.pil_to_numpy(given["image"])
    assert len(seen.escaped) == 1
    assert seen.uses == {"image": {None}}
    assert Seen().resized == {}
