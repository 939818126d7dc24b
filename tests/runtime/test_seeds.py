"""Seeds mean torch's noise."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipcast.errors import RequestError
from slipcast.sampling.seeds import TorchGenerator, batch_noise

SEEDS = st.one_of(st.integers(0, 100), st.integers(0, 2**64 - 1))


def ulps(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Largest distance in units of the last place (of 0.25 for smaller numbers: sines near 0 lose digits)."""
    assert ours.dtype == theirs.dtype == np.float32
    unit = np.spacing(np.maximum(np.abs(theirs), np.float32(0.25)))
    return int(np.ceil((np.abs(ours - theirs) / unit).max(initial=0)))


def torch_generator(seed: int) -> torch.Generator:
    signed = seed if seed < 2**63 else seed - 2**64
    return torch.Generator("cpu").manual_seed(signed)


@settings(deadline=None, max_examples=150)
@given(seed=SEEDS, sizes=st.lists(st.one_of(st.integers(1, 15), st.integers(16, 700)), min_size=1, max_size=4))
def test_streams_are_torchs(seed: int, sizes: list[int]) -> None:
    """Any mix of small and large arrays, in order, from one generator."""
    ours, theirs = TorchGenerator(seed), torch_generator(seed)
    for size in sizes:
        a, b = ours.randn((size,)), torch.randn(size, generator=theirs).numpy()
        assert ulps(a, b) <= (1 if size < 16 else 8)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (4, 16, 16), (1, 4, 3, 5), (2, 4, 5, 5), (1, 3), (), (0, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    ours = TorchGenerator(7).randn(shape)
    theirs = torch.randn(shape, generator=torch_generator(7)).numpy()
    assert ours.shape == theirs.shape
    assert ulps(ours, theirs) <= 8


def test_most_numbers_are_equal_bit_for_bit() -> None:
    for seed in range(100):
        a, b = TorchGenerator(seed).randn((15,)), torch.randn(15, generator=torch_generator(seed)).numpy()
        assert (a == b).sum() >= 14
    a, b = TorchGenerator(5).randn((65536,)), torch.randn(65536, generator=torch_generator(5)).numpy()
    assert (a == b).mean() > 0.5
    assert np.abs(a - b).max() < 2e-6


def test_torch_uses_the_low_32_bits_of_a_seed() -> None:
    np.testing.assert_array_equal(TorchGenerator(2**63 + 5).randn((4,)), TorchGenerator(5).randn((4,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "7", None, np.float32(3)])
def test_other_seeds_are_refused(seed: object) -> None:
    with pytest.raises(RequestError, match=r"0 to 2\*\*64 - 1"):
        TorchGenerator(seed)  # type: ignore[arg-type]


def test_an_image_of_a_batch_is_what_its_seed_gives_alone() -> None:
    batch = [TorchGenerator(seed) for seed in (3, 4, 5)]
    alone = TorchGenerator(4)
    for _ in range(2):  # the stream goes on
        noise = batch_noise(batch, (4, 8, 8))
        assert noise.shape == (3, 4, 8, 8)
        assert noise.dtype == np.float32
        np.testing.assert_array_equal(noise[1], alone.randn((4, 8, 8)))


def test_it_is_diffusers_draw() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    theirs = randn_tensor((2, 4, 8, 8), generator=[torch_generator(3), torch_generator(4)], dtype=torch.float32)
    ours = batch_noise([TorchGenerator(3), TorchGenerator(4)], (4, 8, 8))
    assert ulps(ours, theirs.numpy()) <= 8


def test_a_latent_takes_well_under_a_millisecond() -> None:
    generator = TorchGenerator(0)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        generator.randn((4, 64, 64))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3
