"""Adapters of low rank (LoRA), set while a bundle is loaded: arrays that components read, and nothing else changes."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.tensorfile import read_header, read_tensor
from slipcast.engines import Array
from slipcast.errors import RequestError

Floats = npt.NDArray[np.float32]
Pair = tuple[Floats, Floats]  # down [inputs, rank] and up [rank, outputs], scaled by alpha

# How peft, diffusers and kohya call the two factors, and the number that their product is scaled by.
FACTORS = {
    "down": re.compile(r"(.+?)\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down)\.weight"),
    "up": re.compile(r"(.+?)\.(?:lora_B(?:\.\w+)?|lora_up|lora\.up)\.weight"),
    "alpha": re.compile(r"(.+?)\.alpha"),
}
PREFIXES = re.compile(r"base_model\.model\.|diffusion_model\.|lora_unet_|lora_transformer_")
OF_TEXT = re.compile(r"text_encoder|lora_te")
OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
BY_FUSING = "fuse it when compiling: [[lora]] in the recipe"


class Adapters:
    """What was loaded, and what is set. Of layers that an adapter leaves alone the slots are zero."""

    def __init__(self, manifest: ProgramManifest) -> None:
        record = manifest.adapters
        self._rank, layers = (record.rank, record.layers) if record else (0, ())
        self._components = record.components if record else {}
        slots = manifest.slots
        self._sizes = {name: (slots[f"down_{at}"][0], slots[f"up_{at}"][1]) for at, name in enumerate(layers)}
        self._wanted = {
            plain: [spec.name for spec in manifest.components[name].inputs if spec.name in slots]
            for plain, name in self._components.items()
        }
        self._loaded: dict[str, dict[str, Pair]] = {}

    @property
    def components(self) -> Mapping[str, str]:
        """By component, the one that takes its place while adapters are set."""
        return self._components

    def load(self, name: str, path: Path) -> None:
        """Read an adapter from a .safetensors file; RequestError where it does not fit."""
        if not self._sizes:
            raise RequestError(
                "this bundle has no slots for adapters",
                expected="a bundle that was compiled with [adapters]",
                hint=f"compile it with [adapters], or {BY_FUSING}",
            )
        self._loaded[name] = read_adapter(path, self._sizes, self._rank)

    def chosen(self, scales: Mapping[str, float]) -> dict[str, tuple[str, dict[str, Array]]]:
        """By component, what takes its place with these adapters, and its slots; nothing where none has a scale."""
        for name, scale in scales.items():
            if name not in self._loaded:
                raise RequestError(
                    f"there is no adapter {name!r}",
                    expected=", ".join(self._loaded) or "one that load_adapter has read",
                    got=name,
                )
            if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
                raise RequestError(f"the scale of {name!r} is no number", expected="a finite number", got=repr(scale))
        used = {name: float(scale) for name, scale in scales.items() if scale}
        if not used:
            return {}
        arrays = {}
        for at, (layer, (inputs, outputs)) in enumerate(self._sizes.items()):
            pairs = [(self._loaded[name][layer], s) for name, s in used.items() if layer in self._loaded[name]]
            if (rank := sum(down.shape[1] for (down, _), _ in pairs)) > self._rank:
                raise RequestError(
                    f"these adapters are too much for the slots of {layer}",
                    expected=f"a rank of {self._rank} together",
                    got=str(rank),
                    hint="set fewer at once, or compile the bundle with a larger adapters.rank",
                )
            down, up = np.zeros((inputs, self._rank), np.float32), np.zeros((self._rank, outputs), np.float32)
            begin = 0
            for (own_down, own_up), scale in pairs:
                end = begin + own_down.shape[1]
                down[:, begin:end], up[begin:end] = own_down, own_up * np.float32(scale)
                begin = end
            for kind, array in (("down", down), ("up", up)):
                array.setflags(write=False)
                arrays[f"{kind}_{at}"] = array
        return {
            plain: (self._components[plain], {name: arrays[name] for name in names})
            for plain, names in self._wanted.items()
        }


def read_adapter(path: Path, sizes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, Pair]:
    """By layer, of those with slots, whose (inputs, outputs) are `sizes`, what an adapter adds.

    RequestError for what has no slot, with the nearest names; ArtifactError for a damaged file, or NaN.
    """
    entries, named = read_header(path), _names(sizes)
    found: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        kind, layer = _place(path, key, named)
        array = read_tensor(path, entry)
        if array.ndim == 4 and array.shape[2:] == (1, 1):  # of a layer that the pipeline has as a 1x1 convolution
            array = array[:, :, 0, 0]
        found.setdefault(layer, {})[kind] = array
    if not found:
        raise RequestError(f"{path.name} is empty", expected="a LoRA")
    return {layer: _pair(path, layer, parts, sizes[layer], rank) for layer, parts in found.items()}


def _names(sizes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Layer by all names that files have for it: with its component's and without, and with underscores."""
    found: dict[str, str] = {}
    for layer in sizes:
        short = layer.partition(".")[2]
        for name in (layer, short, short.replace(".", "_")):
            found.setdefault(name, layer)
    return found


def _place(path: Path, key: str, named: Mapping[str, str]) -> tuple[str, str]:
    """What a tensor is, and of which layer."""
    for part, name in OTHERS.items():
        if part in key:
            raise RequestError(f"{path.name} is a {name}", expected="a LoRA", got=key, hint=BY_FUSING)
    # diffusers once had processors beside the layers: attn1.processor.to_out_lora.down.weight
    plain = re.sub(r"\.processor\.(\w+?)_lora\.", lambda m: f".{m[1]}{'.0' * (m[1] == 'to_out')}.lora.", key)
    for kind, pattern in FACTORS.items():
        if match := pattern.fullmatch(plain):
            module = PREFIXES.sub("", match[1], count=1) if PREFIXES.match(match[1]) else match[1]
            if module in named:
                return kind, named[module]
            if OF_TEXT.match(module):
                raise RequestError(
                    f"{path.name} changes a text encoder, which has no slots", expected="a LoRA of a denoiser",
                    got=key, hint=BY_FUSING,
                )  # fmt: skip
            near = difflib.get_close_matches(module, named, 3) or list(named)[:3]
            raise RequestError(
                f"{path.name}: no layer of this bundle has a slot for {module}",
                expected=f"layers such as {', '.join(near)}",
                got=key,
                hint=f"it is of another model, or adapters.layers does not name it; or {BY_FUSING}",
            )
    raise RequestError(f"{path.name} holds what is no part of a LoRA", expected="*.lora_A.weight", got=key)


def _pair(path: Path, layer: str, parts: Mapping[str, Any], size: tuple[int, int], rank: int) -> Pair:
    if missing := {"down", "up"} - parts.keys():
        raise RequestError(f"{path.name}: {layer} has no {missing.pop()}", expected="both factors")
    down, up = parts["down"], parts["up"]
    own = down.shape[0] if down.ndim == 2 else 0
    if (down.shape, up.shape) != ((own, size[0]), (size[1], own)) or not own:
        raise RequestError(
            f"{path.name}: {layer} is of another shape",
            expected=f"[rank, {size[0]}] and [{size[1]}, rank]",
            got=f"{list(down.shape)} and {list(up.shape)}",
            hint="it is of another model, or of a layer that was pruned",
        )
    if own > rank:
        raise RequestError(
            f"{path.name}: {layer} has a larger rank than the slots",
            expected=f"at most {rank}",
            got=str(own),
            hint=f"compile the bundle with a larger adapters.rank, or {BY_FUSING}",
        )
    alpha = float(np.asarray(parts.get("alpha", own)).reshape(()))
    return down.T.astype(np.float32), up.T.astype(np.float32) * np.float32(alpha / own)
