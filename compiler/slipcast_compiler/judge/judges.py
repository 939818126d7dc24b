"""What [evaluate] judges pictures with, the same for every bundle: what is asked, checked, opened and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import Metrics
from slipcast.errors import RecipeError
from slipcast_compiler.judge.lpips import SMALLEST, Lpips, find_weights
from slipcast_compiler.judge.metrics import Floats, Reference, Samples, choose_captions, intervals, summarise
from slipcast_compiler.judge.scorer import Scorer, find_scorer
from slipcast_compiler.recipe.family import Family, outside
from slipcast_compiler.recipe.recipe import EvaluateTable

BEFORE = "_before"  # of the name of what is sampled of the original


@dataclass(frozen=True)
class Judges:
    """The networks that judge, if any were asked for, and the captions that retrieval chooses from."""

    scorer: Scorer | None = None
    lpips: Lpips | None = None
    captions: tuple[str, ...] = ()

    def reference(self, images: Floats, prompts: Sequence[str | None]) -> Reference:
        """The original's pictures [n, h, w, 3], of prompts from the family."""
        return Reference(images, prompts, self.scorer, self.lpips, self.captions)

    def outside(self, images: Floats, prompts: Sequence[str | None]) -> Reference:
        """The same of prompts out of the family, whose captions are among those that retrieval chooses from."""
        captions = (*self.captions, *choose_captions([prompt or "" for prompt in prompts]))
        return Reference(images, prompts, self.scorer, self.lpips, captions)

    @property
    def record(self) -> dict[str, Any]:
        """The fields of a Quality that say who judged."""
        return {
            "scorer_sha256": self.scorer.sha256 if self.scorer else None,
            "lpips_sha256": self.lpips.sha256 if self.lpips else None,
            "retrieval_captions": len(self.captions) if self.scorer else 0,
        }


def open_judges(table: EvaluateTable, folder: Path, captions: Sequence[str]) -> Judges:
    """Those that [evaluate] names, by paths relative to `folder`; `captions`: the family's prompts."""
    return Judges(
        Scorer(table.scorer, folder) if table.scorer else None,
        Lpips(folder / table.lpips) if table.lpips else None,
        choose_captions(captions),
    )


def weights_of_judges(table: EvaluateTable, folder: Path) -> dict[str, str]:
    """By what [evaluate] names, the SHA-256 over its files; a hub id stands for itself."""
    return {name: _digest(folder, name) for name in (table.scorer, table.lpips) if name}


def check_judges(
    table: EvaluateTable, family: Family | None, sizes: Sequence[tuple[int, int]] | None, folder: Path
) -> tuple[str, ...]:
    """The prompts out of the family; RecipeError where what [evaluate] names is not there, or can judge nothing here.
    `sizes`: (width, height) of all pictures, in pixels; None where something else is made."""
    for key in ("scorer", "lpips", "out_of_family", "out_of_family_file") if table.original else ():
        if getattr(table, key):
            raise RecipeError(
                f"evaluate.{key} compares with the original, and evaluate.original is none",
                expected="none",
                got=getattr(table, key),
            )
    for key in ("scorer", "out_of_family", "out_of_family_file"):
        if getattr(table, key) and not family:
            raise RecipeError(f"evaluate.{key} is for a model with prompts, which this one has not", expected="none")
    for key in ("scorer", "lpips"):
        if getattr(table, key) and sizes is None:
            raise RecipeError(
                f"evaluate.{key} is for pictures, and this pipeline gives none",
                expected="none: of sounds and arrays PSNR alone is run",
                got=getattr(table, key),
            )
    if table.scorer:
        find_scorer(table.scorer, folder)
    if table.lpips:
        find_weights(folder / table.lpips)
        if small := [size for size in sizes or () if min(size) < SMALLEST]:
            raise RecipeError(
                "evaluate.lpips: the pictures are too small",
                expected=f"{SMALLEST} pixels",
                got=f"{small[0][0]}x{small[0][1]}",
            )
    strangers = outside(table, family, folder) if family else ()
    if strangers and family and family.closed:
        raise RecipeError(
            "evaluate.out_of_family: a closed family's bundle takes no other prompts",
            expected="none, or an open family",
            got=f"{len(strangers)} prompts",
        )
    return strangers


def compare(samples: Samples) -> dict[str, Any]:
    """The fields of a Comparison."""
    before = {name.removesuffix(BEFORE): values for name, values in samples.items() if name.endswith(BEFORE)}
    own = {"images": len(samples["psnr"]), "original": summarise(before) if before else Metrics()}
    return summarise(samples).model_dump() | own | {"intervals": intervals(samples)}


def _digest(folder: Path, name: str) -> str:
    total = hashlib.sha256(name.encode())
    for file in sorted(file for file in (folder / name).rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
