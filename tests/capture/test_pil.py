"""Pictures of PIL that are followed: their tensors are what they are, whatever is done to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFilter
from test_refusals import Denoiser, Plain
from transformers import CLIPImageProcessor

from slipcast.errors import RecipeError
from slipcast_compiler.capture.call import make_call, with_other_pictures
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
    "reduced": lambda image: image.resize((9, 12), Image.Resampling.BICUBIC, reducing_gap=1),
    "reduced by six": lambda image: image.resize((12, 12), LANCZOS, reducing_gap=1.0),
    "reduced at once": lambda image: image.resize((6, 4), LANCZOS, reducing_gap=2.0),
    "nearest": lambda image: image.resize((21, 13), Image.Resampling.NEAREST),
}
ESCAPING: dict[str, Callable[[Image.Image], Image.Image]] = {
    "turned": lambda image: image.rotate(90),
    "beyond its sides": lambda image: image.crop((-2, 0, 10, 10)),
    "reduced, not evenly": lambda image: image.resize((7, 5), LANCZOS, reducing_gap=1.0),
    "of a box": lambda image: image.resize((8, 8), LANCZOS, box=(0, 0, 10, 10)),
    "blurred": lambda image: image.filter(ImageFilter.BLUR),
    "flipped": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
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
def test_what_is_not_followed_is_plain_and_has_escaped(done: Callable[[Image.Image], Image.Image]) -> None:
    call = {"image": picture()}
    given = in_pil(editing(lambda pipe, image: image), call)
    with followed(given, call) as seen:
        assert not isinstance(done(given["image"]), Picture)
    assert seen.escaped


def test_one_that_is_pasted_is_followed() -> None:
    call = {"image": picture()}
    given = in_pil(editing(lambda pipe, image: image), call)
    with followed(given, call) as seen:
        for box in ((4, 6), (-3, -5), (30, 20), None, (-40, 0)):
            canvas = Image.new("RGB", (36, 24), (1, 2, 3))
            canvas.paste(given["image"], box)
            canvas.paste(given["image"].resize((9, 9), LANCZOS), (1, 1))
            assert isinstance(canvas, Picture)
            wanted = np.array(canvas.plain(), np.float32).transpose(2, 0, 1)[None]
            assert np.abs(canvas.levels.numpy() - wanted).max() <= 1
    assert not seen.escaped
    assert Image.Image.paste.__name__ == "paste"


def test_copies_remember() -> None:
    image = followed_in(picture())
    for copied in (copy.copy(image), copy.deepcopy(image)):
        assert isinstance(copied, Picture) and torch.equal(copied.levels, image.levels)


def test_arrays_beyond_what_pictures_are_stay_as_they_are() -> None:
    pipe = editing(lambda pipe, image: image)
    fine = picture() * 0.9
    for array in (picture() * 2, fine, picture().repeat(2, 1, 1, 1), picture(channels=4), torch.ones(1, 8)):
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
    again = [make_call(pipe, with_other_pictures(call), seed=5) for _ in range(2)]
    assert verify(find(pipe, call).program, pipe, *again).holds


def test_one_whose_numbers_are_read_is_given_as_a_tensor() -> None:
    """Where the pipeline takes that; its numbers are those of the picture."""

    def make(pipe: Any, image: Any) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return image * 255
        return read_by_numpy(pipe, image) * 255

    pipe, call = editing(make), {"image": picture()}
    again = [make_call(pipe, with_other_pictures(call), seed=5) for _ in range(2)]
    assert verify(find(pipe, call).program, pipe, *again).holds


def read_by_numpy(pipe: Any, image: Any) -> torch.Tensor:
    return (
        torch.from_numpy(np.frombuffer(image.tobytes(), np.uint8).reshape(1, 24, 36, 3).copy()).permute(0, 3, 1, 2)
        / 255
    )


def drawn_on(pipe: Any, image: Any) -> torch.Tensor:
    changed = image.copy()
    ImageDraw.Draw(changed).rectangle((0, 0, 12, 12), 0)
    made: torch.Tensor = pipe.processor.preprocess(changed)
    return made


def behind_a_processor(pipe: Any, image: Any) -> torch.Tensor:
    return torch.from_numpy(np.sqrt(pipe.processor.pil_to_numpy(image))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("make", [read_by_numpy, drawn_on, behind_a_processor])
def test_one_that_is_read_and_not_followed_is_refused(make: Any) -> None:
    """Of one colour, too: then it looks the same from right to left."""
    for image in (picture(), torch.ones(1, 3, 24, 36)):
        with pytest.raises(RecipeError, match="reads the numbers of a picture where they cannot be followed"):
            capture(editing(make), {"image": image})


def test_what_is_compared_with_is_what_the_pipeline_makes_of_pil() -> None:
    """A processor that is told not to rescale gives levels of a picture, and of a tensor what it was."""
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)

    def make(pipe: Any, image: Any) -> torch.Tensor:
        made: torch.Tensor = processor(images=image, return_tensors="pt").pixel_values.float()
        return made

    pipe, call = editing(make), {"image": picture()}
    type(pipe).components = property(  # type: ignore[method-assign]
        lambda self: {"denoiser": self.denoiser, "scheduler": self.scheduler, "feature_extractor": processor}
    )
    found = call_pipeline(pipe, make_call(pipe, call, seed=5))["x"]
    real = pipe(**make_call(pipe, {}, seed=5) | {"image": followed_in(call["image"]).plain()})["x"]
    assert torch.equal(found, real)


def test_draws_are_the_same_in_a_second_attempt() -> None:
    """Of torch's own generator, too."""

    def make(pipe: Any, image: Any) -> torch.Tensor:
        drawn = torch.randn(1, 1, 1, 1)
        return (read_by_numpy(pipe, image) if isinstance(image, Image.Image) else image) + drawn

    pipe, call = editing(make), {"image": picture()}
    again = [make_call(pipe, with_other_pictures(call), seed=5) for _ in range(2)]
    assert verify(find(pipe, call).program, pipe, *again).holds


def test_the_refusal_is_that_of_what_it_takes() -> None:
    def tensors(pipe: Any, image: Any) -> torch.Tensor:
        image.clone()
        raise KeyError("of its own")

    def pictures(pipe: Any, image: Any) -> torch.Tensor:
        if not isinstance(image, Image.Image):
            raise ValueError("has to be of PIL")
        raise ValueError("too small")

    for make, says in ((tensors, "of its own"), (pictures, "too small")):
        with pytest.raises(RecipeError, match="cannot be captured") as refused:
            capture(editing(make), {"image": picture()})
        assert says in str(refused.value)
        with pytest.raises((KeyError, ValueError), match=says):
            call_pipeline(editing(make), {"image": picture()})


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
        VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(given["image"]))
        assert not seen.escaped
        given["image"].tobytes()
    assert seen.escaped and all("test_pil.py" in place for place in seen.escaped)
    assert seen.uses == {"image": {None}}
    assert Seen().resized == {}


def by_hand(image: Any) -> Any:
    numbers = np.array(image.convert("RGB").resize((36, 24), LANCZOS, reducing_gap=1)).astype(np.float32) / 127.5 - 1
    return torch.from_numpy(np.transpose(numbers, [2, 0, 1])).unsqueeze(0)


def a_mask(image: Any) -> Any:
    grey = np.array(image.convert("L")).astype(np.float32) / 255.0
    mask = grey[None, None]
    mask[mask < 0.5] = 0
    mask[mask >= 0.5] = 1
    return torch.from_numpy(1 - mask)


def a_batch(image: Any) -> Any:
    several = [np.asarray(each, dtype=np.float64)[None, :, 2:-2] for each in (image, image.crop((0, 0, 36, 24)))]
    joined = np.concatenate(several, axis=0).transpose(0, 3, 1, 2)
    return torch.from_numpy(2.0 * joined / 255.0 - 1.0).to(torch.float32)


def stacked(image: Any) -> Any:
    numbers = np.stack([np.array(image), np.array(image)], axis=0).reshape(2, 24, 36, 3)
    return torch.from_numpy(np.expand_dims(-(numbers / 255), 0))[0].permute(0, 3, 1, 2).float()


def in_place(image: Any) -> Any:
    numbers = np.array(image, dtype=np.float32)
    numbers /= 255
    numbers -= 0.5
    return torch.tensor(numbers[None]).permute(0, 3, 1, 2)


def masked_by_another(image: Any) -> Any:
    numbers, grey = np.array(image).astype(np.float32), np.array(image.convert("L"))
    numbers[grey / 255 > 0.5] = -1
    return torch.from_numpy(numbers.copy().transpose(2, 0, 1)[None])


def of_whole_numbers(image: Any) -> Any:
    numbers = torch.from_numpy(np.array(image))
    assert numbers.dtype == torch.uint8
    return (numbers.permute(2, 0, 1)[None] // 2).float()


def written_after(image: Any) -> Any:
    first = torch.from_numpy(np.array(image, np.float32))
    first[first < 127.5] = 0
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] - first.permute(2, 0, 1)[None]


FOLLOWED_IN_NUMPY = [by_hand, a_mask, a_batch, stacked, in_place, masked_by_another, of_whole_numbers, written_after]


@pytest.mark.parametrize("make", FOLLOWED_IN_NUMPY)
def test_numpy_is_followed(make: Callable[[Any], Any]) -> None:
    pipe, call = editing(lambda pipe, image: make(image)), {"image": picture()}
    program = find(pipe, call).program
    assert "image" in {source.kind for source in program.needed_sources}
    again = [make_call(pipe, with_other_pictures(call), seed=5) for _ in range(2)]
    assert verify(program, pipe, *again).holds
    assert np.array.__module__ == "numpy" and torch.from_numpy.__name__ == "from_numpy"


def as_tensor(numbers: Any) -> torch.Tensor:
    return torch.from_numpy(numbers).permute(2, 0, 1)[None].float()


def within_its_range(image: Any) -> Any:
    numbers = np.array(image).astype(np.float32)
    return as_tensor((numbers - numbers.min()) / (numbers.max() - numbers.min()))


def negative_if_light(image: Any) -> Any:
    numbers = np.array(image).astype(np.float32) / 255
    return as_tensor(numbers if numbers.mean() < 0.5 else 1 - numbers)


def from_its_first_light_row(image: Any) -> Any:
    numbers = np.array(image).astype(np.float32) / 255
    first = int(np.nonzero((numbers > 0.5).any(axis=(1, 2)))[0][0])
    return as_tensor(numbers[first : first + 8])


def written_through_a_view(image: Any) -> Any:
    numbers = np.array(image).astype(np.float32) / 255
    view = numbers[None]
    view[view < 0.5] = 0
    return as_tensor(numbers)


def made_small(image: Any) -> Any:
    image = image.copy()
    image.thumbnail((18, 12))
    return as_tensor(np.array(image))


ESCAPING_IN_NUMPY = [
    within_its_range, negative_if_light, from_its_first_light_row, written_through_a_view, made_small,
    lambda image: as_tensor(np.ascontiguousarray(np.array(image)[::1, ::-1])),
    lambda image: as_tensor(np.array(image) + 200),
    lambda image: as_tensor(np.sqrt(np.array(image, np.float32))),
    lambda image: as_tensor(np.clip(a=np.array(image, np.float32), a_min=0, a_max=99)),
    lambda image: as_tensor(np.array(np.array(image).tolist(), np.float32)),
]  # fmt: skip


@pytest.mark.parametrize("make", ESCAPING_IN_NUMPY)
def test_numpy_that_is_not_followed_is_refused(make: Callable[[Any], Any]) -> None:
    def of_pictures(pipe: Any, image: Any) -> Any:
        assert isinstance(image, Image.Image)
        return make(image)

    with pytest.raises(RecipeError, match="reads the numbers of a picture where they cannot be followed") as refused:
        capture(editing(of_pictures), {"image": picture()})
    assert "test_pil.py:" in str(refused.value.got)


def test_uses_are_seen_in_other_threads_and_where_another_is_pasted() -> None:
    call = {"image": picture()}
    given = in_pil(editing(lambda pipe, image: image), call)
    with followed(given, call) as seen:
        canvas = given["image"].copy()
        canvas.paste(given["image"].resize((9, 9), LANCZOS), (1, 1))
        assert seen.uses == {"image": {None, (9, 9)}} and not seen.escaped
        with ThreadPoolExecutor() as pool:
            pool.submit(given["image"].tobytes).result()
    assert seen.escaped
