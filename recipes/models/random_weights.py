"""Random weights for a checkpoint's configs: to compile and run pipelines at their size where no weights are at hand.

    python recipes/models/random_weights.py CONFIGS OUT [--set transformer.num_layers=2 ...]

CONFIGS: a directory that a diffusers pipeline was saved to, of which nothing but configs and tokenizers is read; or the
name of one of recipes/bench/captures.py, such as "FLUX.1-dev". `--set` changes a key of a component's config. Weights
are bfloat16, in files of at most 5 GB, and the same for the same seed; they are written one at a time, so memory stays
small. What such a pipeline draws is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slipcast.progress import silent
from slipcast_compiler.capture.open import open_without_weights
from slipcast_compiler.host.quiet import quiet

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

LARGEST = 5_000_000_000  # bytes of a file
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def write_checkpoint(configs: str, out: Path, changes: list[str], seed: int) -> None:
    """The directory of a checkpoint, with random weights for all of its modules."""
    if Path(configs).is_dir():
        shutil.copytree(configs, out, ignore=shutil.ignore_patterns(*WEIGHTS))
    else:
        from captures import make

        out.mkdir(parents=True)
        make(configs, out, silent)
    for change in changes:
        key, value = change.split("=", 1)
        component, name = key.split(".", 1)
        file = out / component / "config.json"
        config = json.loads(file.read_text("utf-8"))
        if name not in config:
            sys.exit(f"{component} has no {name}; it has {', '.join(config)}")
        try:
            config[name] = json.loads(value)
        except ValueError:
            sys.exit(f"--set {change}: {value} is no JSON; a text has quotes")
        file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    with quiet():
        pipe = open_without_weights(out)
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            stem = "model" if type(module).__module__.startswith("transformers") else "diffusion_pytorch_model"
            count = write_weights(module, out / name / stem, [seed, zlib.crc32(name.encode())])
            print(f"{name}: {count / 1e6:.0f} M parameters", flush=True)


def write_weights(module: nn.Module, stem: Path, seed: list[int]) -> int:
    """STEM.safetensors, or several with an index; how many numbers they hold."""
    tensors = dict(module.named_parameters()) | dict(_saved_buffers(module))
    files, size = [dict[str, torch.Tensor]()], 0
    for name, tensor in tensors.items():
        if size and size + 2 * tensor.numel() > LARGEST:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += 2 * tensor.numel()
    names = [f"{stem.name}-{at + 1:05}-of-{len(files):05}.safetensors" for at in range(len(files))]
    if len(files) == 1:
        names = [f"{stem.name}.safetensors"]
    for file, own in zip(names, files, strict=True):
        _write_file(stem.with_name(file), own, seed)
    if len(files) > 1:
        places = {name: file for file, own in zip(names, files, strict=True) for name in own}
        total = 2 * sum(tensor.numel() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What state dicts hold besides, such as embeddings of places."""
    saved = module.state_dict(keep_vars=True)
    return ((name, each) for name, each in module.named_buffers() if name in saved)


def _write_file(file: Path, tensors: dict[str, torch.Tensor], seed: list[int]) -> None:
    """A safetensors file: the size of its header, the header, and the tensors in its order."""
    header, position = dict[str, Any](), 0
    for name, tensor in tensors.items():
        kind, size = ("BF16", 2) if tensor.is_floating_point() else ("I64", 8)
        end = position + size * tensor.numel()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            made = tensor.detach() if tensor.device.type != "meta" else _values(name, tensor, seed)
            stream.write(_bytes(made))


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.is_floating_point():
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    return tensor.to(torch.int64).contiguous().numpy().tobytes()


def _values(name: str, like: torch.Tensor, seed: list[int]) -> torch.Tensor:
    """As torch begins: variance 1 / (3 fan-in), so activations stay finite; norms are the identity, places count."""
    shape = tuple(like.shape)
    if not like.is_floating_point():
        return torch.arange(shape[-1] if shape else 1).expand(shape or 1)
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith(("bias", "mean")) else 1.0)
    # A stream for each name: no tensor depends on the order in which they are written.
    rng = np.random.default_rng([*seed, zlib.crc32(name.encode())])
    return torch.from_numpy(rng.standard_normal(shape, np.float32)) * (3 * math.prod(shape[1:])) ** -0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="COMPONENT.KEY=JSON")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.out.exists():
        sys.exit(f"{given.out} exists already")
    write_checkpoint(given.configs, given.out, given.changes, given.seed)


if __name__ == "__main__":
    main()
