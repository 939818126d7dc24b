"""LPIPS, version 0.1 (Zhang et al., arXiv 1801.03924), from weights that the user has: nothing is downloaded.

Those are published as .pth files alone. weights_only=True reads them by a machine of torch's own, which knows the few
instructions that tensors need, calls nothing that a file names, and refuses the rest: that is not unpickling.
The networks are here as data, since the `lpips` package needs torchvision, and that a build of it for one's torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.errors import RecipeError
from slipcast_compiler.judge.scorer import digest

Floats = npt.NDArray[np.float32]
SMALLEST = 32  # pixels: a smaller picture leaves the last layers of AlexNet nothing to see
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, of pictures in [-1, 1]


@dataclass(frozen=True)
class Stage:
    """Convolutions of torchvision's `features`, each with a ReLU, after max pooling by 2 if `pool`."""

    convolutions: tuple[int, ...]
    pool: int = 0
    stride: int = 1
    padding: int = 1


# heads in the lpips package -> torchvision's weights, and the stages whose outputs are compared
NETWORKS = {
    "alex.pth": ("alexnet*.pth", (
        Stage((0,), stride=4, padding=2), Stage((3,), pool=3, padding=2), Stage((6,), pool=3), Stage((8,)),
        Stage((10,)),
    )),
    "vgg.pth": ("vgg16*.pth", (
        Stage((0, 2)), Stage((5, 7), pool=2), Stage((10, 12, 14), pool=2), Stage((17, 19, 21), pool=2),
        Stage((24, 26, 28), pool=2),
    )),
}  # fmt: skip
FILES = "alex.pth of the lpips package (v0.1) and torchvision's alexnet-*.pth, or vgg.pth and vgg16-*.pth"


class Lpips:
    """Distance of pictures as deep features see it: 0 for equal ones, about 0.7 for unrelated ones."""

    def __init__(self, folder: Path) -> None:
        """RecipeError where `folder` does not hold the weights of one network; see FILES."""
        heads, backbone = find_weights(folder)
        self._stages = NETWORKS[heads.name][1]
        self._weights = {**_load(heads), **_load(backbone)}
        needed = [f"lin{i}.model.1.weight" for i in range(len(self._stages))]
        for index in (index for stage in self._stages for index in stage.convolutions):
            needed += [f"features.{index}.weight", f"features.{index}.bias"]
        if absent := [name for name in needed if name not in self._weights]:
            raise RecipeError(f"evaluate.lpips: {folder} lacks weights", expected=FILES, got=f"no {absent[0]}")
        self._weights = {name: self._weights[name].float() for name in needed}

    def __call__(self, a: Floats, b: Floats) -> Floats:
        """float32 [n], picture i of a against picture i of b, both [n, h, w, 3] in [0, 1]."""
        found = [self._distance(first, second) for first, second in zip(a, b, strict=True)]
        return np.array(found, np.float32)

    @cached_property
    def sha256(self) -> str:
        """Over the names and values of all weights that are used."""
        return digest(self._weights)

    def _distance(self, a: Floats, b: Floats) -> float:
        import torch

        pictures = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2) * 2 - 1
        x = (pictures - torch.tensor(SHIFT).view(3, 1, 1)) / torch.tensor(SCALE).view(3, 1, 1)
        total = 0.0
        with torch.no_grad():
            for place, stage in enumerate(self._stages):
                x = self._run(stage, x)
                first, second = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                seen = (first - second).square() * self._weights[f"lin{place}.model.1.weight"][0]
                total += float(seen.sum(0).mean())
        return total

    def _run(self, stage: Stage, x: Any) -> Any:
        from torch.nn import functional

        if stage.pool:
            x = functional.max_pool2d(x, stage.pool, 2)
        for index in stage.convolutions:
            weight, bias = (self._weights[f"features.{index}.{name}"] for name in ("weight", "bias"))
            x = functional.conv2d(x, weight, bias, stage.stride, stage.padding).relu()
        return x


def find_weights(folder: Path) -> tuple[Path, Path]:
    """The files of the heads and of the network; RecipeError where there is not exactly one network of NETWORKS."""
    found = [
        (folder / heads, backbone)
        for heads, (pattern, _) in NETWORKS.items() if (folder / heads).is_file()
        for backbone in sorted(folder.glob(pattern))
    ]  # fmt: skip
    if len(found) != 1:
        got = ", ".join(sorted(file.name for file in folder.glob("*.pth"))) or "no .pth files"
        raise RecipeError("evaluate.lpips has no weights", expected=f"a directory with {FILES}", got=f"{folder}: {got}")
    return found[0]


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        weights: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises of several types, for pickles that hold more than tensors too
        raise RecipeError(
            f"evaluate.lpips: {file} cannot be read", expected="tensors alone", got=str(error).splitlines()[0]
        ) from None
    return weights
