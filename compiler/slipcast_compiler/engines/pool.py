"""The files of a bundle by content: what two engines have in common lies there once, and the manifest says so twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from slipcast.bundle.manifest import EngineFiles
from slipcast_compiler.host.cache import RECORD


class Pool:
    """A bundle's directory, to which engines are added.

    An engine's files are shared all or none: a graph names its weights' file, and looks for it beside itself. Engines
    of one target may have one file of weights, under one name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[str | None, ...], EngineFiles] = {}
        self._digests: dict[str, str] = {}  # by path

    def know(self, files: EngineFiles, digests: Mapping[str, str]) -> None:
        """An engine that is there already; `digests`: SHA-256 by path."""
        self._known.setdefault(_content(files, digests), files)
        self._digests |= {file: digests[file] for file in (files.model, files.weights) if file}

    def add(self, entry: Path, files: EngineFiles, place: str) -> EngineFiles:
        """Copy an engine from its entry in the cache to the directory `place`, unless it is there under some name."""
        digests = json.loads((entry / RECORD).read_text())["files"]
        content = _content(files, digests)
        if content not in self._known:
            (self.folder / place).mkdir(exist_ok=True)
            for name in filter(None, (files.model, files.weights)):
                known = self._digests.setdefault(f"{place}/{name}", digests[name])
                assert known == digests[name], f"{place}/{name} is another engine's already"
                shutil.copyfile(entry / name, self.folder / place / name)
            placed = {kind: f"{place}/{name}" for kind, name in files if name}
            self._known[content] = EngineFiles(**placed)
        return self._known[content]


def _content(files: EngineFiles, digests: Mapping[str, str]) -> tuple[str | None, ...]:
    return digests[files.model], digests[files.weights] if files.weights else None
