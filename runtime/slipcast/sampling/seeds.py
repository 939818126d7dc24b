"""Seeds that mean the same noise as in diffusers: torch's CPU generator, in numpy.

`torch.Generator("cpu")` is an MT19937 whose words are turned to normals in two ways (ATen `DistributionTemplates.h`,
`DistributionsHelper.h`): arrays of 16 and more by Box-Muller on 24-bit uniforms in blocks of 16; smaller ones number by
number, in double precision, two per Box-Muller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slipcast.errors import RequestError

_BLOCK = 16


class TorchGenerator:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`.

    `seed` is an integer from 0 to 2**64 - 1, of which torch uses the low 32 bits. The underlying words and uniforms
    are torch's exactly. Arrays of fewer than 16 numbers are double-precision Box-Muller, rounded once: equal to
    torch's, save for rare last-bit differences between maths libraries. Larger ones agree to a few units in the last
    place (about 85 % are equal), because torch computes log, sin and cos in float32 with approximations that depend on
    the CPU.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
            raise RequestError("not a seed", expected="an integer from 0 to 2**64 - 1", got=repr(seed))
        self.seed = int(seed)
        self._bits = np.random.RandomState(self.seed & 0xFFFFFFFF)  # torch's seeding is the reference init_genrand
        self._spare: float | None = None

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Standard normal noise, as `torch.randn(shape, generator=g)`; repeated calls continue the stream."""
        size = math.prod(shape)
        if size < _BLOCK:
            return np.array([self._normal() for _ in range(size)], np.float32).reshape(shape)
        uniform = self._uniform24(size)
        normal = np.empty(size, np.float32)
        whole = size - size % _BLOCK
        normal[:whole] = _box_muller(uniform[:whole])
        if whole < size:  # torch fills the last 16 again, from new words
            normal[-_BLOCK:] = _box_muller(self._uniform24(_BLOCK))
        return normal.reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._bits.randint(0, 2**32, count, dtype=np.uint32)

    def _uniform24(self, count: int) -> NDArray[np.float32]:
        return (self._words(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _normal(self) -> float:
        """One normal in double precision; the second of each Box-Muller pair waits for the next call, across arrays."""
        if self._spare is not None:
            spare, self._spare = self._spare, None
            return spare
        high1, low1, high2, low2 = (int(word) for word in self._words(4))
        angle = 2 * math.pi * (((high1 << 32 | low1) & (2**53 - 1)) * 2.0**-53)
        radius = math.sqrt(-2 * math.log1p(-((high2 << 32 | low2) & (2**53 - 1)) * 2.0**-53))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals from uniforms of [0, 1), both flat with a length divisible by 16: in a block, 8 radii, then 8 angles."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    normal: NDArray[np.float32] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return normal


def batch_noise(generators: Sequence[TorchGenerator], shape: Sequence[int]) -> NDArray[np.float32]:
    """Noise of shape (len(generators), *shape), each image's from its own generator.

    So image i of a batch is what its seed gives alone. `shape` has no batch axis.
    """
    return np.stack([generator.randn(shape) for generator in generators])
