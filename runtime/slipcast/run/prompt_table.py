"""The prompts of a closed family: conditioning from a table, in place of tokenizers and text encoders.

A bundle that samples has a row of each tensor for each prompt; one of a captured program, a tensor.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import ClosedPrompts
from slipcast.bundle.program import Program
from slipcast.bundle.sources import TableSource
from slipcast.bundle.tensorfile import DTYPES, TensorEntry, read_header, read_tensor
from slipcast.errors import ArtifactError, RequestError

COMPARED = 500  # characters of a refused prompt that are compared with the listed ones
NEAREST = 3


class PromptTable:
    """What text encoders would give, by prompt. Reading it raises ArtifactError where it is not the manifest's."""

    def __init__(self, path: Path, closed: ClosedPrompts) -> None:
        self._rows = {prompt: row for row, prompt in enumerate(closed.prompts)}
        self._columns = {name: read_tensor(path, entry) for name, entry in read_header(path).items()}
        wanted = {spec.name: (spec.dtype, (len(self._rows), *spec.shape)) for spec in closed.outputs}
        if (found := {name: (array.dtype.name, array.shape) for name, array in self._columns.items()}) != wanted:
            raise ArtifactError(
                f"{path}: not the table of the manifest", expected=wanted, got=found, hint="compile the bundle again"
            )

    def __call__(self, prompts: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """By input of the denoiser, float32 [len(prompts), ...]. All prompts have to be listed: see `check`."""
        rows = [self._rows[prompt] for prompt in prompts]
        return {name: column[rows] for name, column in self._columns.items()}

    def check(self, name: str, prompts: Sequence[str]) -> None:
        """RequestError, with the nearest listed prompts, for the first that is not listed."""
        check_listed(name, prompts, self._rows)


def check_listed(name: str, prompts: Sequence[str], closed: Collection[str]) -> None:
    """RequestError, with the nearest prompts of a closed family, for the first that is none of them."""
    for prompt in prompts:
        if prompt not in closed:
            listed = [each for each in closed if each]
            near = difflib.get_close_matches(prompt[:COMPARED], listed, n=NEAREST)
            some = f"the nearest: {', '.join(map(repr, near))}" if near else f"such as {listed[0]!r}"
            raise RequestError(
                f"{name} is not of this bundle's closed family",
                expected=f"one of {len(listed)} prompts, {some}" + (", or none" if name != "prompt" else ""),
                got=repr(prompt[:COMPARED]),
                hint="compile a bundle with --set family.closed=false",
            )


class ClosedTable:
    """The table of a captured program's closed family; ArtifactError where it is not the manifest's."""

    def __init__(self, path: Path, program: Program) -> None:
        assert program.closed
        self._path, self._entries = path, read_header(path)
        self._places = {prompt: place for place, prompt in enumerate(program.closed.prompts)}
        for source in (each for variant in program.every for each in variant.sources if isinstance(each, TableSource)):
            for place in self._places.values() if source.argument else (0,):
                _check_entry(path, source, source.name_at(place), self._entries.get(source.name_at(place)))

    def __call__(self, source: TableSource, text: str) -> npt.NDArray[Any]:
        """What a text becomes, read when it is asked for."""
        name = source.name_at(self._places[text] if source.argument else 0)
        return read_tensor(self._path, self._entries[name], allow_nonfinite=True)  # a mask may have -inf


def _check_entry(path: Path, source: TableSource, name: str, entry: TensorEntry | None) -> None:
    fits = (
        entry is not None
        and np.dtype(DTYPES[entry.dtype][1]).name == source.dtype
        and len(entry.shape) == len(source.shape)
        and all(isinstance(b, str) or a == b for a, b in zip(entry.shape, source.shape, strict=True))
    )
    if not fits:
        raise ArtifactError(
            f"{path}: not the table of the manifest", expected=f"{name}, {source.dtype} {list(source.shape)}",
            got=f"{entry.dtype} {list(entry.shape)}" if entry else "no such tensor", hint="compile the bundle again",
        )  # fmt: skip
