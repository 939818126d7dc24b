"""Programs of prompts of any length: what follows the length is found, and what follows it otherwise is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from test_refusals import Denoiser
from tiny.parts import word_tokenizer

from slipcast.errors import RecipeError
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.find import Found, find
from slipcast_compiler.capture.program import Affine, Call, Length, Padding, measure, rebuild
from slipcast_compiler.capture.ranges import extend
from slipcast_compiler.capture.verify import verify

HERE = Path(__file__).name
OTHERS = ("red", "a large blue star on a black background", " ".join(["blue star"] * 40))


class Worded(DiffusionPipeline):  # type: ignore[misc]
    """Adds to three numbers of two channels what it makes of the tokens of a prompt."""

    padding: Any = False

    def __init__(self, denoiser: Denoiser, scheduler: DDIMScheduler, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, tokenizer=tokenizer)

    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """float32 [1, tokens, 2]."""
        return ids[..., None].float().expand(1, ids.shape[1], 2)

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int = 3, generator: Any = None) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(prompt, padding=self.padding, truncation=True, return_tensors="pt")
        text = self.denoiser(self.of_text(tokens.input_ids, tokens.attention_mask))
        x = torch.randn(3, 2, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            x = self.scheduler.step(self.denoise(x, text), time, x).prev_sample
        return {"x": x}

    def denoise(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x) + text.mean(dim=1)


class Doubled(Worded):
    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        text = super().of_text(ids, mask)
        return torch.cat([text, text], dim=1).view(1, 2 * ids.shape[1], 2)[:, 1:]


class Joined(Doubled):
    """Its loop is given no tensor that has as many rows as there are tokens."""

    def denoise(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x[None], text], dim=1).view(1, 3 + text.shape[1], 2)
        return self.denoiser(both)[0, :3] + both.mean(dim=1)


class Placed(Worded):
    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().of_text(ids, mask) * torch.arange(ids.shape[1])[None, :, None]


class Padded(Worded):
    """Reads how many tokens there are into Python."""

    padding = "max_length"

    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (super().of_text(ids, mask) * mask[..., None])[:, : int(mask.sum())]


class PaddedByItself(Worded):
    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if missing := -ids.shape[1] % 4:
            ids = torch.cat([torch.full((1, missing), 7), ids], dim=1)
        return super().of_text(ids, mask)


class Squared(Worded):
    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().of_text(ids, mask).repeat(1, ids.shape[1], 1)


class PlacedAround(Worded):
    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().of_text(ids, mask) * torch.arange(ids.shape[1]).roll(1)[None, :, None]


class Scaled(Worded):
    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().of_text(ids, mask) * (1 / ids.shape[1])


class Branching(Worded):
    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        text = super().of_text(ids, mask)
        return text.sin() if ids.shape[1] > 10 else text.cos()


class AsLongAsTheLonger(Worded):
    """Fills the shorter of two texts up, of which one is always the same."""

    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        text, other = super().of_text(ids, mask), self.denoiser(torch.ones(1, 4, 2))
        short, long = (text, other) if ids.shape[1] < 4 else (other, text)
        missing = long.shape[1] - short.shape[1]
        return torch.cat([long, torch.cat([short, short.new_zeros(1, missing, 2)], dim=1)], dim=1)


def made(kind: Any) -> Any:
    """A pipeline of this class."""
    return kind(Denoiser(), DDIMScheduler(), word_tokenizer(1024 if kind is not Padded else 128))


def _line(text: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{HERE}:{next(number for number, line in enumerate(lines, 1) if text in line)}"


def _laws(found: Found) -> set[str]:
    """Of all arguments."""
    laws = set[str]()

    def note(value: Any) -> Any:
        laws.update([str(value)] if isinstance(value, Affine) else [])
        return value

    for event in found.program.events:
        rebuild((event.args, event.kwargs), note)
    return laws


@pytest.mark.parametrize(
    ("kind", "laws", "range_"),
    [
        (Worded, {"length"}, (2, 501)),
        (Doubled, {"length", "2*length"}, (2, 501)),
        (Joined, {"length", "2*length", "2*length+2"}, (2, 501)),
        (Placed, {"length"}, (2, 501)),
        (Padded, {"length"}, (2, 121)),
        (PaddedByItself, {"length"}, (4, 504)),
    ],
)
def test_what_follows_a_length_is_found_and_holds_for_others(kind: Any, laws: set[str], range_: Any) -> None:
    pipe = made(kind)
    found = find(pipe, {})
    (length,) = found.program.lengths
    assert _laws(found) == laws and (length.minimum, length.maximum) == range_
    for prompt in OTHERS:
        verdict = verify(found.program, pipe, make_call(pipe, {}, prompt, 3), make_call(pipe, {}, prompt, 3))
        assert verdict.error == 0 and verdict.holds


def test_short_texts_that_go_another_way_are_left_out() -> None:
    pipe = made(AsLongAsTheLonger)
    found = find(pipe, {})
    assert [(each.minimum, each.maximum) for each in found.program.lengths] == [(6, 501)]
    for prompt in OTHERS[1:]:
        assert verify(found.program, pipe, make_call(pipe, {}, prompt, 3), make_call(pipe, {}, prompt, 3)).error == 0


def test_a_size_that_would_be_negative_is_refused() -> None:
    program = find(made(AsLongAsTheLonger), {}).program
    short = find(made(Worded), {}).program
    with pytest.raises(RecipeError, match="the length of a prompt decides") as refused:
        extend(program, [replace(short, sources=tuple(_one_token(each) for each in short.sources))])
    assert refused.value.got == "length-4 with length 1"


def _one_token(source: Any) -> Any:
    return replace(source, value=source.value[:, :1]) if source.kind == "prompt" else source


def test_a_part_whose_inputs_do_not_tell_a_length_is_given_the_tokens() -> None:
    found = find(made(Joined), {})
    denoiser = next(part for part in found.cut.parts if part.name == "denoiser")
    ((tokens, length),) = [(each.value, each) for each in denoiser.lengths]
    assert length == found.program.lengths[0] and tokens in denoiser.inputs
    assert all(tokens in use.inputs for use in found.cut.uses if use.part == "denoiser")


def test_shapes_follow_too_and_parts_tell_lengths_by_their_inputs() -> None:
    found = find(made(Doubled), {})
    text = next(event for event in found.program.events if isinstance(event, Call))
    ((_, value),) = text.outputs
    assert found.program.specs[value] == ((1, Affine("length", 2, -1), 2), torch.float32)
    assert [part.name for part in found.cut.parts if part.lengths] == ["conditioning"]
    assert Affine("length", 2, -1).at({"length": 5}) == 9


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (Squared, ".repeat(1, ids"),
        (PlacedAround, ".roll(1)"),
        (Scaled, "(1 / ids"),
        (Branching, "text.sin()"),
    ],
)
def test_what_follows_a_length_otherwise_is_refused_with_its_line(kind: Any, code: str) -> None:
    with pytest.raises(RecipeError, match="the length of a prompt decides what the pipeline does") as refused:
        find(made(kind), {})
    assert kind.__name__ in str(refused.value) and _line(code) in str(refused.value.got)


def test_ranges_grow_with_other_texts() -> None:
    """Where the longest texts are done otherwise, and where all are done alike."""
    program = find(made(Worded), {}).program
    (length,) = program.lengths
    assert extend(program, []) == program
    short = replace(program, lengths=(replace(length, minimum=9, maximum=9),))
    (grown,) = extend(short, [program]).lengths
    (tokens,) = [source.value.shape[1] for source in program.needed_sources if source.kind == "prompt"]
    assert (grown.minimum, grown.maximum) == (min(9, tokens), max(9, tokens))


def test_lengths_are_sizes_or_sums() -> None:
    by_size, by_sum = Length("length", 2, 9, 0, 1, -3), Length("length_2", 2, 9, 1, None)
    values = {0: torch.zeros(1, 4), 1: torch.tensor([[1, 1, 1, 0]])}
    assert measure((by_size, by_sum), values) == {"length": 7, "length_2": 3}


def test_tokens_are_padded_to_a_multiple() -> None:
    tokens = torch.tensor([[5, 6, 7]])
    assert Padding(4, 0, True)(tokens).tolist() == [[0, 5, 6, 7]]
    assert Padding(2, 9, False)(tokens).tolist() == [[5, 6, 7, 9]]
    assert Padding(3, 0, True)(tokens).tolist() == [[5, 6, 7]]
