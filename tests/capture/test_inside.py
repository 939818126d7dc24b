"""What components do inside, where their Python reads how long a prompt is: programs and bundles of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import bundle_of
from diffusers import DDIMScheduler
from test_generalise import OTHERS, Worded
from test_refusals import Denoiser
from tiny.parts import word_tokenizer
from torch.nn.utils.rnn import pad_sequence

import slipcast
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.find import Found, find
from slipcast_compiler.capture.program import Affine, Call, rebuild
from slipcast_compiler.capture.verify import verify

ROTARY = torch.polar(torch.ones(600, 1), torch.arange(600.0)[:, None])


class Reader(Denoiser):
    """Is given three numbers of two channels, and a text with its mask: what it makes of both, of the first's shape."""

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None, mask: Any = None) -> torch.Tensor:
        x = x @ self.weight
        return x if text is None else x + self.read(x, text @ self.weight, mask)

    def read(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Counts(Reader):
    """Lists how many tokens a mask has, and takes that many."""

    def read(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(dim=1).tolist()
        assert len(set(lengths)) == 1
        return torch.stack([each[:length].mean(dim=0) for each, length in zip(text, lengths, strict=True)])


class Selects(Reader):
    def read(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return text[mask.bool()].mean(dim=0)


class Pads(Reader):
    """To a multiple, where that is missing, and beside a sequence of four."""

    def read(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = text[0]
        if missing := -len(tokens) % 8:
            tokens = torch.cat([tokens, tokens[-1:].repeat(missing, 1)])
        sequences = [torch.ones(8, 2), tokens]
        padded = pad_sequence(sequences, batch_first=True, padding_value=0.0)
        if any(len(each) != max(map(len, sequences)) for each in sequences):
            kept = torch.zeros(padded.shape[:2], dtype=torch.bool)
            for row, each in enumerate(sequences):
                kept[row, : len(each)] = 1
            padded = padded * kept[..., None]
        return padded.sum(dim=(0, 1))


class Places(Reader):
    """Lists positions: those of the text, and then three of a picture, all at one."""

    def read(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        both = torch.cat([text[0], x])
        where = [*range(text.shape[1])] + [text.shape[1]] * 3
        picture = torch.tensor([False] * text.shape[1] + [True] * 3)
        rows = torch.tensor(where, device=text.device)
        rows[picture] += torch.arange(3)
        turned = torch.view_as_complex(both.contiguous())[:, None] * ROTARY[rows]
        return torch.view_as_real(turned).flatten(1)[-3:]


class Measured(Worded):
    """Its denoiser is given the text at every step, with a mask."""

    padding: Any = "max_length"

    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.mask = mask
        return super().of_text(ids, mask)

    def denoise(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x, text, self.mask)


class Unpadded(Measured):
    padding = False


class Keys:
    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []


class Caches(Denoiser):
    """Leaves in an object what later steps read."""

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None, keys: Keys | None = None) -> torch.Tensor:
        x = x @ self.weight
        if keys is None:
            return x
        if text is not None:
            keys.rows.append((text @ self.weight).mean(dim=1))
        return x + keys.rows[0]


class Cached(Worded):
    """Its first step fills a cache."""

    def of_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        type(self).keys = Keys()
        return super().of_text(ids, mask)

    def denoise(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        keys = type(self).keys
        return self.denoiser(x, None if keys.rows else text, keys)


def made(kind: Any, denoiser: Any, longest: int) -> Any:
    return kind(denoiser(), DDIMScheduler(), word_tokenizer(longest))


def _laws(found: Found) -> set[str]:
    """Of all arguments inside of calls."""
    laws = set[str]()

    def note(value: Any) -> Any:
        laws.update([str(value)] if isinstance(value, Affine) else [])
        return value

    for call in found.program.events:
        for event in call.inside.events if isinstance(call, Call) and call.inside else ():
            rebuild((event.args, event.kwargs), note)
    return laws


KINDS = [
    (Measured, Counts, 128, {"length"}, (2, 128)),
    (Measured, Selects, 128, {"length"}, (2, 128)),
    (Unpadded, Pads, 1024, {"up(length, 8)", "-length+up(length, 8)"}, (2, 501)),
    (Unpadded, Places, 1024, {"length"}, (2, 501)),
    (Cached, Caches, 1024, set(), (2, 501)),
]


@pytest.mark.parametrize(("kind", "denoiser", "longest", "laws", "range_"), KINDS)
def test_a_program_follows_what_a_component_reads(
    kind: Any, denoiser: Any, longest: int, laws: set[str], range_: Any
) -> None:
    pipe = made(kind, denoiser, longest)
    found = find(pipe, {})
    assert [(length.minimum, length.maximum) for length in found.program.lengths] == [range_]
    assert laws <= _laws(found)
    for prompt in (*OTHERS, *found.prompts):
        verdict = verify(found.program, pipe, make_call(pipe, {}, prompt, 3), make_call(pipe, {}, prompt, 3))
        assert verdict.error is not None and verdict.error < 1e-6, (prompt, verdict)


@pytest.mark.parametrize(
    ("kind", "denoiser", "longest"),
    [row[:3] if row[1] is Pads else pytest.param(*row[:3], marks=pytest.mark.slow) for row in KINDS],
)
def test_a_bundle_takes_prompts_of_all_lengths(kind: Any, denoiser: Any, longest: int, tmp_path: Path) -> None:
    pipe = made(kind, denoiser, longest)
    bundle = bundle_of(pipe, "worded", [lambda prompt: make_call(pipe, {}, prompt)], tmp_path)
    with slipcast.load(bundle) as loaded:
        for prompt in (*OTHERS, " ".join(["star"] * 7), " ".join(["star"] * 23)):  # of 8 tokens, and of 24
            wanted = pipe(**make_call(pipe, {}, prompt, 3))["x"].numpy()
            found = loaded(prompt, seed=3, output_type="np").images[0]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
