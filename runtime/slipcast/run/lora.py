"""LoRAs as files hold them: factors by many names, and what their product is scaled by; read without torch."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.tensorfile import TensorEntry, read_header, read_metadata, read_tensor
from slipcast.bundle.validation import parse_json
from slipcast.errors import ArtifactError, RequestError

Floats = npt.NDArray[np.float32]
Pair = tuple[Floats, Floats]  # down [inputs, rank] and up [rank, outputs], scaled
Sizes = Mapping[str, tuple[int, int]]  # by layer that has a slot, its inputs and outputs

# How peft, diffusers and kohya call the two factors, and the alpha of kohya's.
FACTORS = {
    "down": re.compile(r"(.+?)\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down)\.weight"),
    "up": re.compile(r"(.+?)\.(?:lora_B(?:\.\w+)?|lora_up|lora\.up)\.weight"),
    "alpha": re.compile(r"(.+?)\.alpha"),
}
PEFT = "base_model.model."  # before the names of files that peft itself wrote, which keep alpha in another
OF_DENOISER = ("diffusion_model.", "lora_unet_", "lora_transformer_")  # prefixes that mean one of these:
DENOISERS = ("unet", "transformer")
OF_TEXT = re.compile(r"text_encoder|lora_te")
OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
DTYPES = ("F16", "BF16", "F32", "F64")
BY_FUSING = "fuse it when compiling: [[lora]] in the recipe"
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Scaling:
    """What a file says of alpha, by the names of modules that it has there; see LoraConfig of peft."""

    alpha: float | None = None
    patterns: Mapping[str, float] | None = None
    stabilised: bool = False  # rsLoRA: by the root of the rank

    def of(self, module: str, rank: int) -> float:
        """The number that the product of a module's factors is scaled by."""
        alpha = rank if self.alpha is None else self.alpha
        for pattern, value in (self.patterns or {}).items():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = value
        return alpha / (math.sqrt(rank) if self.stabilised else rank)


def read_lora(path: Path, sizes: Sizes, rank: int, component: str | None) -> dict[str, Pair]:
    """By layer with a slot, what a LoRA adds. `component`: whose layers it changes, where its names do not say.

    RequestError for what has no slot, with the nearest names, before any tensor is read; ArtifactError for a damaged
    file, or NaN.
    """
    entries, names = read_header(path), _Names(sizes, component)
    found: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in entries.items():
        kind, layer = names.place(path, key)
        if kind in found.setdefault(layer, {}):
            raise RequestError(f"{path.name}: {layer} has more than one {kind}", expected="one", got=_shown(key))
        found[layer][kind] = entry
    if not found:
        raise RequestError(f"{path.name} is empty", expected="a LoRA")
    for layer, parts in found.items():
        _check(path, layer, parts, sizes[layer], rank)
    scalings = _scalings(path, any(key.startswith(PEFT) for key in entries))
    return {layer: _pair(path, layer, parts, scalings) for layer, parts in found.items()}


class _Names:
    """Layers by all names that files have for them: with their component's and without, and with underscores."""

    def __init__(self, sizes: Sizes, component: str | None) -> None:
        self._of: dict[str, list[str]] = {}
        owners = {layer.partition(".")[0] for layer in sizes}
        if component is not None and component not in owners:
            raise RequestError(
                f"no layer of {component!r} has a slot", expected=" or ".join(sorted(owners)), got=component
            )
        for layer in sizes:
            owner, _, short = layer.partition(".")
            if component in (None, owner):
                for name in (layer, short, short.replace(".", "_")):
                    self._of.setdefault(name, []).append(layer)

    def place(self, path: Path, key: str) -> tuple[str, str]:
        """What a tensor is, and of which layer."""
        for part, name in OTHERS.items():
            if part in key:
                raise RequestError(f"{path.name} is a {name}", expected="a LoRA", got=_shown(key), hint=BY_FUSING)
        # diffusers once had processors beside the layers: attn1.processor.to_out_lora.down.weight
        plain = re.sub(r"\.processor\.(\w+?)_lora\.", lambda m: f".{m[1]}{'.0' * (m[1] == 'to_out')}.lora.", key)
        for kind, pattern in FACTORS.items():
            if match := pattern.fullmatch(plain):
                return kind, self._layer(path, match[1], key)
        raise RequestError(f"{path.name} holds what is no part of a LoRA", expected="*.lora_A.weight", got=_shown(key))

    def _layer(self, path: Path, module: str, key: str) -> str:
        module, prefix = module.removeprefix(PEFT), next((p for p in OF_DENOISER if module.startswith(p)), "")
        name = module.removeprefix(prefix)
        fitting = self._of.get(name, [])
        if prefix:  # of several components, a denoiser is meant, and no ControlNet
            fitting = [each for each in fitting if each.partition(".")[0] in DENOISERS] or fitting
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise RequestError(
                f"{path.name}: {_shown(module)} may be of several components",
                expected="load_adapter(..., component=...)",
                got=", ".join(fitting),
            )
        if OF_TEXT.match(module):
            raise RequestError(
                f"{path.name} changes a text encoder, which has no slots", expected="a LoRA of a denoiser",
                got=_shown(key), hint=BY_FUSING,
            )  # fmt: skip
        near = difflib.get_close_matches(name[:200], self._of, 3) or list(self._of)[:3]
        raise RequestError(
            f"{path.name}: no layer of this bundle has a slot for {_shown(name)}",
            expected=f"layers such as {', '.join(near)}",
            got=_shown(key),
            hint="it is of another model; or adapters.layers does not name it; or what the layer gives was computed"
            f" when the bundle was compiled, or it was factorised; or {BY_FUSING}",
        )


def _check(path: Path, layer: str, parts: Mapping[str, TensorEntry], size: tuple[int, int], rank: int) -> None:
    """RequestError where factors are not of the layer's shape, before they are read."""
    if missing := sorted({"down", "up"} - parts.keys()):
        raise RequestError(f"{path.name}: {layer} has no {missing[0]}", expected="both factors")
    if wrong := [each for each in parts.values() if each.dtype not in DTYPES]:
        raise RequestError(f"{path.name}: {layer} is no LoRA", expected=", ".join(DTYPES), got=wrong[0].dtype)
    down, up = (_matrix(parts[kind].shape) for kind in ("down", "up"))
    own = down[0] if len(down) == 2 else 0
    if (down, up) != ((own, size[0]), (size[1], own)) or not own or math.prod(_alpha_shape(parts)) != 1:
        raise RequestError(
            f"{path.name}: {layer} is of another shape",
            expected=f"[rank, {size[0]}] and [{size[1]}, rank]",
            got=f"{list(down)} and {list(up)}",
            hint="it is of another model, or of a layer that was pruned",
        )
    if own > rank:
        raise RequestError(
            f"{path.name}: {layer} has a larger rank than the slots",
            expected=f"at most {rank}",
            got=str(own),
            hint=f"compile the bundle with a larger adapters.rank, or {BY_FUSING}",
        )


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the sides of a 1x1 convolution, which a pipeline may have had there."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _alpha_shape(parts: Mapping[str, TensorEntry]) -> tuple[int, ...]:
    return parts["alpha"].shape if "alpha" in parts else ()


def _pair(path: Path, layer: str, parts: Mapping[str, TensorEntry], scalings: Mapping[str, Scaling]) -> Pair:
    down, up = (read_tensor(path, parts[kind]).reshape(_matrix(parts[kind].shape)) for kind in ("down", "up"))
    owner, _, short = layer.partition(".")
    scale = scalings.get(owner, scalings.get("", Scaling())).of(short, len(down))
    if "alpha" in parts:
        scale = float(read_tensor(path, parts["alpha"]).reshape(())) / len(down)
    with np.errstate(over="ignore"):
        pair = down.T.astype(np.float32), (up.T * scale).astype(np.float32)
    if not all(np.isfinite(each).all() for each in pair):
        raise ArtifactError(f"{path.name}: {layer} has numbers that float32 cannot hold", expected="finite numbers")
    return pair


def _scalings(path: Path, of_peft: bool) -> dict[str, Scaling]:
    """By component, "" for any, what the file's metadata says, or peft's config beside it."""
    if of_peft:
        file = path.with_name("adapter_config.json")
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_CONFIG_BYTES + 1)
        except OSError:
            raise RequestError(
                f"{path.name} was written by peft, which keeps the scale in another file",
                expected=f"{file.name} beside it",
                hint="copy it too, or save the LoRA by diffusers' save_lora_weights",
            ) from None
        return {"": _scaling(parse_json(data, str(file), limit=MAX_CONFIG_BYTES), str(file))}
    if (text := read_metadata(path).get("lora_adapter_metadata")) is None:
        return {}
    name = f"{path} (lora_adapter_metadata)"
    document = parse_json(text.encode(), name)
    if not isinstance(document, dict):
        raise ArtifactError(f"{name} is no object", expected="peft's settings by component")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in document.items():  # transformer.lora_alpha
        owner, _, setting = str(key).rpartition(".")
        settings.setdefault(owner, {})[setting] = value
    return {owner: _scaling(each, name) for owner, each in settings.items()}


def _scaling(settings: Any, name: str) -> Scaling:
    if not isinstance(settings, dict):
        raise ArtifactError(f"{name} is no object", expected="peft's settings")
    if settings.get("use_dora"):
        raise RequestError(f"{name} is a DoRA", expected="a LoRA", hint=BY_FUSING)
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    numbers = [alpha, *patterns.values()] if isinstance(patterns, dict) else [patterns]
    if any(isinstance(each, bool) or not isinstance(each, int | float | None) for each in numbers):
        raise ArtifactError(f"{name}: lora_alpha is no number", expected="numbers", got=repr(numbers)[:200])
    return Scaling(alpha, {str(key): float(value) for key, value in patterns.items()}, bool(settings.get("use_rslora")))


def _shown(name: str) -> str:
    return ascii(name[:200])[1:-1]
