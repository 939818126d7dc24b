"""Which of a component's files hold its weights: one rule, for the bundle and for the original that it is judged by.

A *variant* is what stands in a file's name before `.safetensors` and the number of a shard: `fp16` of
`model.fp16-00001-of-00002.safetensors`; the plain files have none. Where one variant is there twice, the libraries
differ, and the rule with them: diffusers takes the shards, transformers the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.errors import ArtifactError

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PREFERRED = ("", "fp16", "bf16", "ema")  # without a wish; others follow, and non_ema is the last
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
_SHARD = r"-\d{4,6}-of-\d{4,6}"
_FILE = re.compile(rf"(?P<stem>[^.]+?)(?P<first>{_SHARD})?(\.(?P<variant>[^.]+?))?(?P<last>{_SHARD})?\.safetensors")
_INDEX = re.compile(
    r"(?P<stem>[^.]+)(\.(?P<before>[^.]+))?\.safetensors\.index(\.(?P<after>[^.]+))?\.json"
)  # fmt: skip

ReadJson = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class WeightFiles:
    """A component's weights: whole, or shards with the index that names them."""

    variant: str
    files: tuple[Path, ...]
    index: Path | None = None


def is_weights(file: Path) -> bool:
    """Whether a file of a component's folder holds weights or is an index of some."""
    name = file.name
    return name.endswith(".safetensors") or ".safetensors.index." in name or file.suffix in PICKLES or ".bin." in name


def find_weight_files(folder: Path, library: str, wish: str | None, read_json: ReadJson) -> WeightFiles:
    """The files of the variant that is wished for, if the component has it, or else of the first of PREFERRED.

    A variant whose shards are not all there is none. Raises ArtifactError where nothing can be read safely.
    """
    whole, sharded, missing = _variants(folder, read_json)
    found = sharded | whole if library == "transformers" else whole | sharded
    missing = {variant: error for variant, error in missing.items() if variant not in found}
    if wish and wish in missing:
        raise missing[wish]
    for variant in (wish, *PREFERRED, *sorted(found.keys() - {*PREFERRED, "non_ema"}), "non_ema"):
        if variant is not None and variant in found:
            return found[variant]
    for error in missing.values():
        raise error
    names = sorted(file.name for file in folder.glob("*"))
    raise ArtifactError(
        f"{folder}: no weights", expected="*.safetensors, whole or with an index", got=", ".join(names) or "nothing",
        hint="save the pipeline again with safe_serialization=True: pickled weights are never loaded",
    )  # fmt: skip


def variants_of(folder: Path, read_json: ReadJson) -> set[str]:
    """The variants that a component has, in part or whole."""
    return set().union(*_variants(folder, read_json))


def _variants(
    folder: Path, read_json: ReadJson
) -> tuple[dict[str, WeightFiles], dict[str, WeightFiles], dict[str, ArtifactError]]:
    """By variant: whole files, shards, and what is wrong with shards that are not all there."""
    sharded, missing, shards = dict[str, WeightFiles](), dict[str, ArtifactError](), set[Path]()
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        match = _INDEX.fullmatch(index.name)
        if not match:
            continue
        variant, files = match["after"] or match["before"] or "", _shards(index, read_json)
        shards |= {*files}
        if absent := [file.name for file in files if not file.is_file()]:
            missing[variant] = ArtifactError(
                f"{index}: shards are missing", expected=", ".join(file.name for file in files),
                got=f"without {absent[0]}", hint="download the checkpoint again",
            )  # fmt: skip
        else:
            sharded.setdefault(variant, WeightFiles(variant, files, index))
    whole: dict[str, WeightFiles] = {}
    # A name that a library gives goes before others.
    stems = tuple(STEMS.values())
    for file in sorted(
        folder.glob("*.safetensors"), key=lambda file: (file.name.split(".")[0] not in stems, file.name)
    ):
        match = _FILE.fullmatch(file.name)
        if match and file not in shards and not (match["first"] or match["last"]):
            variant = match["variant"] or ""
            whole.setdefault(variant, WeightFiles(variant, (file,)))
    return whole, sharded, missing


def _shards(index: Path, read_json: ReadJson) -> tuple[Path, ...]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise ArtifactError(f"{index}: no weight_map", expected="a file name for every tensor")
    names = sorted(set(mapped.values()))
    if strays := [name for name in names if Path(name).name != name]:
        raise ArtifactError(f"{index}: leads out of its folder", expected="file names", got=strays[0])
    if pickled := [name for name in names if not name.endswith(".safetensors")]:
        raise ArtifactError(f"{index}: names a file that is no safetensors", expected="*.safetensors", got=pickled[0])
    return tuple(index.parent / name for name in names)
