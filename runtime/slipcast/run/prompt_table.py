"""The prompts of a closed family: conditioning from a table, in place of tokenizers and text encoders."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import ClosedPrompts
from slipcast.bundle.tensorfile import read_header, read_tensor
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
        for prompt in prompts:
            if prompt not in self._rows:
                listed = [each for each in self._rows if each]
                near = difflib.get_close_matches(prompt[:COMPARED], listed, n=NEAREST)
                some = f"the nearest: {', '.join(map(repr, near))}" if near else f"such as {listed[0]!r}"
                raise RequestError(
                    f"{name} is not of this bundle's closed family",
                    expected=f"one of {len(listed)} prompts, {some}" + (", or none" if name != "prompt" else ""),
                    got=repr(prompt[:COMPARED]),
                    hint="compile a bundle with --set family.closed=false",
                )
