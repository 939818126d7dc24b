"""What a bundle can be compared with. A peer is a line of PEERS; how it draws is the file in sides/ that it names."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipcast_compiler.bench.venvs import VENVS

COMPILER = "pip install 'slipcast[compiler]'"


@dataclass(frozen=True)
class Peer:
    """`needs`: distributions, of this environment or of the peer's own (`venv`, a name in VENVS). `programs`: any of
    them has to be on the path. `options` go to the side; `sampling` replaces fields of the bundle's.

    `images`: at most so many, where the peer is too slow for all. `batches`: whether it can draw several at once. A
    peer whose sampling takes another way to the picture has none to compare pixel by pixel: `pixels` is False. `gpu`:
    it needs one, and a build of torch for it.
    """

    title: str
    side: str
    needs: tuple[str, ...]
    install: str
    options: Mapping[str, Any] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    venv: str | None = None
    images: int | None = None
    batches: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)
    pixels: bool = True
    gpu: bool = False


_TORCH = ("torch", "diffusers", "transformers")
_EXPLICIT = {"timesteps": None, "sigmas": None, "eta": 0.0}  # in place of what the bundle's own schedule may have
_DDPM = {"sampler": "ddpm", "schedule": "trailing", "steps": 1000, **_EXPLICIT}
_DDIM = {"sampler": "ddim", "schedule": "leading", "steps": 50, **_EXPLICIT}

PEERS: dict[str, Peer] = {
    "diffusers": Peer("diffusers, fp32", "diffusers.py", _TORCH, COMPILER, {"dtype": "float32"}),
    "diffusers-bf16": Peer("diffusers, bf16", "diffusers.py", _TORCH, COMPILER, {"dtype": "bfloat16"}),
    "torch-compile": Peer(
        "diffusers, fp32, torch.compile on the U-Net",
        "diffusers.py",
        _TORCH,
        f"{COMPILER}, and a C++ compiler: apt-get install g++",
        {"dtype": "float32", "compile": True},
        programs=("g++", "clang++"),
    ),
    "torch-compile-cuda": Peer(
        "diffusers, bf16, torch.compile on the U-Net, on the GPU",
        "diffusers.py",
        _TORCH,
        f"{COMPILER}, with a build of torch for CUDA",
        {"dtype": "bfloat16", "compile": True, "device": "cuda"},
        gpu=True,
    ),
    "optimum-onnxruntime": Peer(
        "Optimum, ONNX Runtime fp32",
        "optimum.py",
        ("optimum-onnx", "onnxruntime", "diffusers"),
        "pip install 'optimum-onnx[onnxruntime]' diffusers",
        {"backend": "onnxruntime"},
        venv="optimum-onnxruntime",
    ),
    "optimum-openvino": Peer(
        "Optimum, OpenVINO in the precision it chooses",
        "optimum.py",
        ("optimum-intel", "openvino", "diffusers"),
        "pip install 'optimum-intel[openvino]' diffusers",
        {"backend": "openvino"},
        venv="optimum-openvino",
    ),
    "optimum-openvino-static": Peer(
        "Optimum, OpenVINO, fixed to one image of one size",
        "optimum.py",
        ("optimum-intel", "openvino", "diffusers"),
        "pip install 'optimum-intel[openvino]' diffusers",
        {"backend": "openvino", "static": True},
        venv="optimum-openvino",
        batches=False,
    ),
    "openvino-genai": Peer(
        "OpenVINO GenAI in the precision it chooses",
        "genai.py",
        ("openvino-genai", "optimum-intel", "diffusers"),
        "pip install openvino-genai 'optimum-intel[openvino]' diffusers",
        venv="optimum-openvino",
        batches=False,
        pixels=False,
    ),
    "openvino-genai-static": Peer(
        "OpenVINO GenAI, fixed to one image of one size",
        "genai.py",
        ("openvino-genai", "optimum-intel", "diffusers"),
        "pip install openvino-genai 'optimum-intel[openvino]' diffusers",
        {"static": True},
        venv="optimum-openvino",
        batches=False,
        pixels=False,
    ),
    "ddpm1000": Peer(
        "diffusers, fp32, DDPM in 1000 steps",
        "diffusers.py",
        _TORCH,
        COMPILER,
        {"dtype": "float32"},
        images=2,
        batches=False,
        sampling=_DDPM,
        pixels=False,
    ),
    "ddim50": Peer(
        "diffusers, fp32, DDIM in 50 steps",
        "diffusers.py",
        _TORCH,
        COMPILER,
        {"dtype": "float32"},
        images=4,
        batches=False,
        sampling=_DDIM,
        pixels=False,
    ),
}


def interpreter(peer: Peer, folder: Path) -> str | None:
    """The Python that has what the peer needs: that of its own environment under `folder`, or this one; or None."""
    if peer.programs and not any(map(shutil.which, peer.programs)):
        return None
    if peer.venv and (own := VENVS[peer.venv].python(folder / peer.venv)):
        return str(own)
    return sys.executable if all(map(_installed, peer.needs)) else None


def how_to_install(name: str) -> str:
    """The command that makes a missing peer available."""
    peer = PEERS[name]
    return f"slipcast bench BUNDLE --against {name} --make-venvs, or {peer.install}" if peer.venv else peer.install


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
