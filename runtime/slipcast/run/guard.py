"""Does a prompt resemble the family that a bundle was made for? Its distance to the family's calibration prompts.

A prompt is told by what the text encoder gives the denoiser, averaged over its words. Its distance is the mean to the
nearest calibration prompts; the threshold is a quantile of their own distances, each to the others, so that a share of
`false_alarms` of the family's prompts is taken for strangers (conformal prediction, arXiv 2107.07511, with scores left
one out). Other words for the same are strangers too, more or less: see recipes/study/guard.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import EMBEDDINGS
from slipcast.bundle.records import BaseGuard, GuardPolicy
from slipcast.bundle.tensorfile import read_header, read_tensor
from slipcast.errors import ArtifactError, RequestError
from slipcast.run.tokenizer import shorten

logger = logging.getLogger("slipcast")

Floats = npt.NDArray[np.float32]

NEIGHBOURS = 3


@dataclass(frozen=True)
class Verdict:
    """Of one prompt. `in_family`: distance <= threshold. `fallback`: the unspecialised engine drew it."""

    distance: float
    threshold: float
    in_family: bool
    fallback: bool


class Guard:
    """Distances to the family. Reading it raises ArtifactError where the table is not the manifest's."""

    def __init__(self, path: Path, record: BaseGuard, special: npt.NDArray[np.int64]) -> None:
        """`special`: token ids that are no words: those of the empty prompt."""
        self._threshold, self._special = record.threshold, special
        entries = read_header(path)
        found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        if found != (wanted := {EMBEDDINGS: ("F32", record.shape)}):
            raise ArtifactError(
                f"{path}: not the table of the manifest", expected=wanted, got=found, hint="compile the bundle again"
            )
        self._family: Floats = read_tensor(path, entries[EMBEDDINGS])

    def judge(
        self, prompts: Sequence[str], ids: npt.NDArray[np.int64], hidden: Floats, policy: GuardPolicy
    ) -> list[Verdict]:
        """One for each prompt, with its tokens [n, length] and what the encoder makes of them, [n, length, width].

        RequestError for the first stranger, where they are refused.
        """
        verdicts = []
        for prompt, embedding in zip(prompts, embed(ids, hidden, self._special), strict=True):
            distance, limit = nearness(self._family, embedding), self._threshold
            inside = distance <= limit
            if not inside:
                self._meet(prompt, distance, policy)
            verdicts.append(Verdict(distance, limit, inside, not inside and policy == "fallback"))
        return verdicts

    def _meet(self, prompt: str, distance: float, policy: GuardPolicy) -> None:
        """Say that there is a stranger, or refuse it."""
        limit = self._threshold
        problem = f"{shorten(prompt)} is not of the family that this bundle was made for"
        if policy == "refuse":
            raise RequestError(
                problem,
                expected=f"a prompt within a distance of {limit:.3g}",
                got=f"{distance:.3g}",
                hint='word it as the family does, or draw it all the same with guard="warn"',
            )
        by = "; its unspecialised denoiser draws it" if policy == "fallback" else ""
        logger.warning("%s (distance %.3g, threshold %.3g)%s", problem, distance, limit, by)


def embed(ids: npt.NDArray[np.int64], hidden: Floats, special: npt.NDArray[np.int64]) -> Floats:
    """[n, width] of length 1: the means of [n, length, width] over tokens that are words; over all, where none is."""
    words = ~np.isin(ids, special)
    words[~words.any(axis=1)] = True
    means = np.stack([row[chosen].mean(axis=0) for row, chosen in zip(hidden, words, strict=True)])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return np.asarray(means / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32)


def nearness(family: Floats, embedding: Floats) -> float:
    """Mean Euclidean distance to the nearest: of one embedding at a time, so that it does not depend on the others."""
    distances = np.linalg.norm(family - embedding, axis=1)
    return float(np.sort(distances)[:NEIGHBOURS].mean())


def choose_policy(record: BaseGuard | None, asked: object) -> GuardPolicy:
    """What a call asks for in place of the bundle's own policy; RequestError where the bundle cannot do it."""
    if asked is None:
        return record.policy if record else "warn"
    legal: list[GuardPolicy] = ["warn"]  # which any bundle can: without a guard there is nothing to warn of
    if record:
        legal = [name for name in get_args(GuardPolicy) if name != "fallback" or record.policy == "fallback"]
    if asked not in legal:
        raise RequestError(
            "guard is not usable",
            expected=" or ".join(legal),
            got=repr(asked),
            hint=f'compile a bundle with --set guard.policy="{asked}"' if asked in get_args(GuardPolicy) else None,
        )
    return asked
