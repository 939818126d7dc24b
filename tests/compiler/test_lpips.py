"""LPIPS, against its definition written down a second time with torch's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lpips_weights import FILES, write_lpips
from torch import nn

from slipcast.errors import RecipeError
from slipcast_compiler.judge.lpips import Lpips

TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # the ReLUs whose outputs are compared


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
    features, heads = write_lpips(tmp_path, net)
    pictures = np.random.default_rng(0).random((2, 2, 40, 32, 3), dtype=np.float32)
    found = Lpips(tmp_path)(*pictures)
    assert found == pytest.approx([_defined(net, features, heads, a, b) for a, b in zip(*pictures, strict=True)], 1e-4)
    assert found.min() > 1e-3
    assert (Lpips(tmp_path)(pictures[0], pictures[0]) == 0).all()


def test_the_digest_is_of_the_weights_that_are_used(tmp_path: Path) -> None:
    write_lpips(tmp_path, "alex")
    before, file = Lpips(tmp_path).sha256, tmp_path / FILES["alex"][1]
    weights = torch.load(file, weights_only=True)
    for name, same in (("classifier.6.bias", True), ("features.8.bias", False)):
        weights[name][0] += 1
        torch.save(weights, file)
        assert (Lpips(tmp_path).sha256 == before) is same


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.lpips has no weights"):
        Lpips(tmp_path)
    write_lpips(tmp_path, "alex")
    heads, backbone = (tmp_path / name for name in FILES["alex"])
    weights = torch.load(backbone, weights_only=True)
    torch.save({name: value for name, value in weights.items() if name != "features.3.bias"}, backbone)
    with pytest.raises(RecipeError, match=r"features\.3\.bias"):
        Lpips(tmp_path)
    torch.save(nn.Linear(1, 1), heads)  # a pickle that would run code is not loaded
    with pytest.raises(RecipeError, match=r"alex\.pth cannot be read"):
        Lpips(tmp_path)
    write_lpips(tmp_path, "alex")
    write_lpips(tmp_path, "vgg")
    with pytest.raises(RecipeError, match="no weights"):
        Lpips(tmp_path)
