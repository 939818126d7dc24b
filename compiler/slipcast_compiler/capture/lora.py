"""Low-rank adapters (LoRA), fused: added to a checkpoint's weights before anything else is done with it.

diffusers' own loader reads an adapter, in whatever form it was published, into the modules of its pipeline. That takes
their shapes, not their weights: what the adapter adds is then written over a copy of the checkpoint's files, one tensor
at a time. Hu et al., LoRA (arXiv:2106.09685), section 4.1: W + (alpha / r) B A.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.tensorfile import read_header, read_tensor
from slipcast.errors import HostError, RecipeError
from slipcast_compiler.host.files import copy
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.checkpoint import find_weight
from slipcast_compiler.model.digests import digest
from slipcast_compiler.model.links import link_plainly
from slipcast_compiler.model.single_file import CONVERTED
from slipcast_compiler.model.weight_files import PICKLES
from slipcast_compiler.recipe.recipe import LoraTable, ModelTable, Recipe

# What other kinds of adapters call their tensors; a product of two matrices is no part of them, or not all.
OTHERS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT",
    "boft_": "BOFT", "ia3_": "IA3", "lora_bias": "LoRA with biases", "diff_b": "LoRA with biases",
}  # fmt: skip
# How the two matrices of a layer end in the forms that diffusers reads.
_PAIRS = (
    ".lora_A", ".lora_B", ".lora_down", ".lora_up", ".lora.down", ".lora.up", "_lora.down", "_lora.up",
    ".lora_embedding_A", ".lora_embedding_B", ".lora_linear_layer.down", ".lora_linear_layer.up",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A file, and by how much it counts."""

    file: Path
    scale: float
    sha256: str


def with_adapters(recipe: Recipe, folder: Path, root: Path, name: str) -> tuple[Path, str]:
    """The checkpoint of a recipe with its [[lora]] fused, and what it is called then."""
    adapters = [find_adapter(table, folder) for table in recipe.lora]
    told = [f" + {each.file.name} (scale {each.scale:g}, sha256 {each.sha256[:12]})" for each in adapters]
    return fuse(root, recipe.model, adapters), name + "".join(told)


def find_adapter(table: LoraTable, folder: Path) -> Adapter:
    """A file, relative to `folder`, or of the hub. RecipeError where it is none or no LoRA."""
    file = folder / table.path
    if not file.is_file() and table.file:
        file = _download(table)
    if not file.is_file():
        raise RecipeError(
            "lora.path does not exist", expected="a .safetensors file, or a hub id with lora.file", got=str(file)
        )
    if file.suffix.lower() in PICKLES:
        raise RecipeError(
            f"{file}: a pickle is never loaded", expected="a .safetensors file", got=file.suffix,
            hint="convert it to safetensors where you trust it",
        )  # fmt: skip
    header = read_header(file)
    for mark, kind in OTHERS.items():
        if found := next((name for name in header if mark in name), None):
            raise RecipeError(f"{file}: an adapter of another kind", expected="LoRA", got=f"{kind}: {found}")
    if strange := [name for name in header if _layer(name) is None]:
        raise RecipeError(
            f"{file}: not a LoRA", expected="pairs of low-rank matrices, and their alphas",
            got=f"{len(strange)} other tensors, such as {strange[0]}",
        )  # fmt: skip
    for entry in header.values():
        read_tensor(file, entry)  # NaN is told before anything is made of it
    with file.open("rb") as stream:
        return Adapter(file, table.scale, hashlib.file_digest(stream, "sha256").hexdigest())


def fuse(root: Path, model: ModelTable, adapters: Sequence[Adapter]) -> Path:
    """A copy of the checkpoint in which the adapters are part of the weights, kept in CONVERTED: what they do not touch
    is linked. Weights keep their dtype.

    RecipeError where diffusers cannot load an adapter into this pipeline, or where a part of it goes nowhere.
    """
    total = hashlib.sha256(f"{root}\0{digest(root, None)}\n".encode())  # the path too: links lead there
    for each in adapters:
        total.update(f"{each.sha256}\0{each.scale}\0{model.variant}\n".encode())
    made = CONVERTED / f"{root.name}-lora-{total.hexdigest()[:16]}"
    if not made.is_dir():
        CONVERTED.mkdir(parents=True, exist_ok=True)
        work = Path(mkdtemp(prefix=".making-", dir=CONVERTED))
        try:
            link_plainly(root, model.variant, work)
            for component, layers in _read(work, model.pipeline, adapters).items():
                _add(work / component, layers)
            if not made.is_dir():  # by another compile
                work.rename(made)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return made.resolve()


def _download(table: LoraTable) -> Path:
    if not table.revision:
        raise RecipeError(
            f"lora.path: no file {table.path}; as a hub id it needs lora.revision",
            expected="a commit hash or tag, so that the compile can be repeated",
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(table.path, str(table.file), revision=table.revision))
    except Exception as error:  # the library raises many kinds, all of which mean that it could not be fetched
        raise HostError(
            f"{table.path}@{table.revision}: cannot be downloaded", got=str(error).splitlines()[0],
            hint="check the network and the name, or download it elsewhere and give the file as lora.path",
        ) from error  # fmt: skip


def _layer(name: str) -> str | None:
    """What a tensor's name calls its layer; None for tensors that no LoRA has."""
    stem = name.removesuffix(".weight").removesuffix(".default")
    if stem.endswith(".alpha"):
        return stem.removesuffix(".alpha")
    return next((stem.removesuffix(end) for end in _PAIRS if stem.endswith(end)), None)


def _read(root: Path, pipeline: str | None, adapters: Sequence[Adapter]) -> dict[str, _Layers]:
    """By component, what the adapters add to its layers: to peft's modules, whose own weights were never read."""
    from slipcast_compiler.capture.open import open_without_weights  # imports torch

    pipe = open_without_weights(root, pipeline)
    modules = {name: part for name, part in pipe.components.items() if hasattr(part, "named_modules")}
    if not hasattr(pipe, "load_lora_weights"):
        raise RecipeError(
            f"{type(pipe).__name__} has no LoRA in diffusers", expected="a pipeline with load_lora_weights"
        )
    for module in modules.values():
        module.to_empty(device="cpu")  # memory that nobody writes to is not taken
    for at, adapter in enumerate(adapters):
        try:
            with quiet():
                pipe.load_lora_weights(
                    str(adapter.file.parent), weight_name=adapter.file.name, adapter_name=f"adapter_{at}",
                    use_safetensors=True, local_files_only=True,
                )  # fmt: skip
        except Exception as error:  # of diffusers and peft: each has its own for what does not fit
            raise RecipeError(
                f"{adapter.file}: diffusers cannot load it into {type(pipe).__name__}",
                expected="a LoRA for this model",
                got=" ".join(f"{type(error).__name__}: {error}".split())[:400],
            ) from error  # fmt: skip
        _check_taken(adapter, at, modules)
    found = {name: dict(_adapted(module)) for name, module in modules.items()}
    scales = [adapter.scale for adapter in adapters]
    return {name: _Layers(layers, scales) for name, layers in found.items() if layers}


def _adapted(module: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def _check_taken(adapter: Adapter, at: int, modules: Mapping[str, Any]) -> None:
    """RecipeError where fewer layers were adapted than the file has: diffusers is silent of what it does not know."""
    given = {layer for name in read_header(adapter.file) if (layer := _layer(name))}
    taken = {name for module in modules.values() for name, layer in _adapted(module) if _has(layer, at)}
    count = sum(_has(layer, at) for module in modules.values() for _, layer in _adapted(module))
    if count >= len(given):
        return
    plain = {name.replace(".", "_") for name in taken}
    lost = sorted(each for each in given if not each.replace(".", "_").endswith(tuple(plain)))
    example = lost[0] if lost else "one of those that others have too"
    names = [name for module in modules.values() for name, part in module.named_modules() if hasattr(part, "weight")]
    nearest = get_close_matches(example, names, n=3, cutoff=0.3)
    raise RecipeError(
        f"{adapter.file}: of {len(given)} layers nothing takes {len(given) - count}",
        expected=f"layers of this model, such as {', '.join(nearest)}" if nearest else "layers of this model",
        got=example, hint="is it a LoRA for another model?",
    )  # fmt: skip


def _has(layer: Any, at: int) -> bool:
    return f"adapter_{at}" in {*layer.lora_A, *layer.lora_embedding_A}


@dataclass(frozen=True)
class _Layers:
    """What adapters add to the layers of one component, by name; `scales` of the adapters in their order."""

    layers: Mapping[str, Any]
    scales: Sequence[float]

    def added(self, name: str) -> npt.NDArray[np.float32]:
        layer = self.layers[name]
        parts = [
            scale * layer.get_delta_weight(f"adapter_{at}") for at, scale in enumerate(self.scales) if _has(layer, at)
        ]
        total: npt.NDArray[np.float32] = sum(parts[1:], parts[0]).detach().float().numpy()
        return total


def _add(folder: Path, found: _Layers) -> None:
    """Write the sums over copies of a component's files, which were links."""
    weights = {
        name: (file, entry)
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in read_header(file).items()
    }
    copied = set[Path]()
    for name in found.layers:
        own = find_weight(f"{name}.weight", weights)
        added = found.added(name)
        if own is None or added.size != np.prod(own[1].shape) or own[1].dtype not in _WRITTEN:
            raise RecipeError(
                f"{folder.name}: a LoRA cannot be added to {name}",
                expected=f"a weight of {list(added.shape)} in {', '.join(_WRITTEN)}",
                got=f"{list(own[1].shape)} in {own[1].dtype}" if own else "no such weight in the checkpoint",
            )  # fmt: skip
        file, entry = own
        if file not in copied:
            source = file.resolve()
            file.unlink()
            copy(source, file)
            copied.add(file)
        total = read_tensor(file, entry) + added.reshape(entry.shape)
        data = _WRITTEN[entry.dtype](total)
        with file.open("r+b") as stream:
            stream.seek(entry.start)
            stream.write(data)


def _as_bfloat16(values: npt.NDArray[Any]) -> bytes:
    """Rounded to the nearest, and to even between two."""
    bits = values.astype("<f4").view("<u4")
    upper: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return upper.tobytes()


_WRITTEN: dict[str, Callable[[npt.NDArray[Any]], bytes]] = {
    "F32": lambda values: values.astype("<f4").tobytes(),
    "F16": lambda values: values.astype("<f2").tobytes(),
    "BF16": _as_bfloat16,
}
