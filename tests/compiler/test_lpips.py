"""LPIPS, against its definition written down a second time with torch's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slipcast.errors import RecipeError
from slipcast_compiler.judge.lpips import Lpips

CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # the ReLUs whose outputs are compared
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
FILES = {"alex": ("alex.pth", "alexnet-owt-7be5be79.pth"), "vgg": ("vgg.pth", "vgg16-397923af.pth")}


def _features(net: str) -> nn.Sequential:
    """torchvision's `features`, with random weights."""
    if net == "alex":
        return nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
    layers: list[nn.Module] = []
    before = 3
    for channels in VGG16:
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()] if channels else [nn.MaxPool2d(2, 2)]
        before = channels or before
    return nn.Sequential(*layers)


def _write(folder: Path, net: str) -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(0)
    features, heads = _features(net), [torch.rand(1, channels, 1, 1) for channels in CHANNELS[net]]
    first, second = FILES[net]
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, folder / first)
    weights = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, folder / second)
    return features, heads


def _defined(net: str, features: nn.Sequential, heads: list[torch.Tensor], a: Any, b: Any) -> float:
    """Equation 1 of the paper, for one pair."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (((torch.from_numpy(p) * 2 - 1 - shift) / scale).permute(2, 0, 1)[None] for p in (a, b))
    total = 0.0
    with torch.no_grad():
        for place, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if place in TAPS[net]:
                difference = nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)
                head = heads[TAPS[net].index(place)].flatten()
                total += torch.einsum("nchw,c->nhw", difference**2, head).mean().item()
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_it_is_what_the_paper_defines(net: str, tmp_path: Path) -> None:
    features, heads = _write(tmp_path, net)
    pictures = np.random.default_rng(0).random((2, 2, 40, 32, 3), dtype=np.float32)
    found = Lpips(tmp_path)(*pictures)
    assert found == pytest.approx([_defined(net, features, heads, a, b) for a, b in zip(*pictures, strict=True)], 1e-4)
    assert found.min() > 1e-3
    assert (Lpips(tmp_path)(pictures[0], pictures[0]) == 0).all()


def test_the_digest_is_of_the_weights_that_are_used(tmp_path: Path) -> None:
    _write(tmp_path, "alex")
    before, file = Lpips(tmp_path).sha256, tmp_path / FILES["alex"][1]
    weights = torch.load(file, weights_only=True)
    for name, same in (("classifier.6.bias", True), ("features.8.bias", False)):
        weights[name][0] += 1
        torch.save(weights, file)
        assert (Lpips(tmp_path).sha256 == before) is same


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.lpips has no weights"):
        Lpips(tmp_path)
    _write(tmp_path, "alex")
    heads, backbone = (tmp_path / name for name in FILES["alex"])
    weights = torch.load(backbone, weights_only=True)
    torch.save({name: value for name, value in weights.items() if name != "features.3.bias"}, backbone)
    with pytest.raises(RecipeError, match=r"features\.3\.bias"):
        Lpips(tmp_path)
    torch.save(nn.Linear(1, 1), heads)  # a pickle that would run code is not loaded
    with pytest.raises(RecipeError, match=r"alex\.pth cannot be read"):
        Lpips(tmp_path)
    _write(tmp_path, "alex")
    _write(tmp_path, "vgg")
    with pytest.raises(RecipeError, match="no weights"):
        Lpips(tmp_path)
