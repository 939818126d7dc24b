"""What draws strangers of a captured program: its denoisers as they were before they were made for the family."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slipcast.bundle.onnxfile import external_files
from slipcast.bundle.sampling import Sampling
from slipcast.errors import CheckFailed
from slipcast_compiler.export.program import read_record
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.files import link


@dataclass(frozen=True)
class Strangers:
    """`folder`: a directory of the cache with NAME_fallback.onnx and NAME_fallback.json of each of the `components`, by
    the component in whose place it stands; `samplings`: by variant, the pipeline's own, if it has loops."""

    folder: Path
    components: Mapping[str, str]
    samplings: tuple[Sampling, ...]


def make_strangers(entry: Path, changed: tuple[str, ...], specialised: Path, cache: Cache) -> Strangers:
    """Of a program that was exported to `entry` with the checkpoint's own weights; `changed`: which of the components
    are others for the family, whose program is in `specialised`."""
    record = read_record(entry)
    if record != read_record(specialised):
        raise CheckFailed(
            "the program of the rewritten pipeline is cut otherwise than that of the pipeline as it is",
            expected="one that differs in weights alone, so that either draws in the other's place",
            hint='guard.policy = "refuse", with a bundle of the whole pipeline beside this one, for what it refuses',
        )
    names = {name: f"{name}_fallback" for name in changed}

    def make(out: Path) -> None:
        for plain, name in names.items():
            link(entry / f"{plain}.onnx", out / f"{name}.onnx")
            shutil.copyfile(entry / f"{plain}.json", out / f"{name}.json")
            for file in external_files(entry / f"{plain}.onnx"):
                if not (out / file).exists():
                    link(entry / file, out / file)

    folder = cache.get("strangers", {"program": entry.name, "components": sorted(names)}, make)
    samplings = tuple(variant.loop.sampling for variant in record.every if variant.loop)
    return Strangers(folder, names, samplings)
