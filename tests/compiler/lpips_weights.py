"""LPIPS weights that are random, in the files that others are published in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
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


def write_lpips(folder: Path, net: str) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """Those of a network, into its files; the network without them, and the weights of its heads."""
    torch.manual_seed(0)
    features, heads = _features(net), [torch.rand(1, channels, 1, 1) for channels in CHANNELS[net]]
    first, second = FILES[net]
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, folder / first)
    weights = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, folder / second)
    return features, heads
