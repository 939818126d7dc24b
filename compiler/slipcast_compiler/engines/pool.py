"""The files of a bundle by content: what two engines have in common lies there once, and the manifest says so twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slipcast.bundle.manifest import EngineFiles
from slipcast.bundle.onnxfile import external_ranges
from slipcast_compiler.host.cache import RECORD
from slipcast_compiler.host.files import append, copy

Range = tuple[int, int]  # offset and length


@dataclass
class _Weights:
    """A file of weights in the bundle, of one in the cache: `ranges`, where those of that one lie in it. None: all, and
    where they were."""

    name: str
    ranges: dict[Range, int] | None = field(default_factory=dict)


class Pool:
    """A bundle's directory, to which engines are added.

    Engines of one target that read one file of weights, as parts of a graph do, have it there once, and in it only what
    they read: it is in the cache with the weights of all parts, also of those that are not shipped. A bundle's files
    are its own: whoever has it may write to them, and nobody may write to those of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[str | None, ...], EngineFiles] = {}
        self._digests: dict[str, str] = {}  # by path, of what was copied; "" of what was put together here
        self._weights: dict[tuple[str, str], _Weights] = {}  # by place, and digest in the cache

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
            weights = files.weights
            if weights and files.model.endswith(".onnx"):
                weights = self._add_graph(entry, files, digests, place)
            else:
                for name in filter(None, (files.model, weights)):
                    self._copy(entry / name, f"{place}/{name}", digests[name])
            placed = f"{place}/{files.model}", weights and f"{place}/{weights}"
            self._known[content] = EngineFiles(model=placed[0], weights=placed[1])
        return self._known[content]

    def _copy(self, source: Path, path: str, digest: str) -> None:
        if path not in self._digests:
            copy(source, self.folder / path)
        assert self._digests.setdefault(path, digest) == digest, f"{path} is another engine's already"

    def _add_graph(self, entry: Path, files: EngineFiles, digests: Mapping[str, str], place: str) -> str:
        """A graph, with what it reads of its weights; returns the name of the file that these are in."""
        assert files.weights
        source, digest = entry / files.weights, digests[files.weights]
        read = {(offset, length) for _, offset, length in external_ranges(entry / files.model)}
        if (place, digest) not in self._weights:
            names = (files.weights, f"{files.model}.data", *(f"{files.model}.{i}.data" for i in range(99)))
            name = next(n for n in names if self._digests.get(f"{place}/{n}", digest) == digest)
            whole = sum(length for _, length in read) == source.stat().st_size
            self._weights[place, digest] = _Weights(name, None if whole else {})
            if whole:
                self._copy(source, f"{place}/{name}", digest)
            else:
                self._digests[f"{place}/{name}"] = ""
        held = self._weights[place, digest]
        if held.ranges is None and held.name == files.weights:
            self._copy(entry / files.model, f"{place}/{files.model}", digests[files.model])
            return held.name
        self._rewrite(entry / files.model, read, source, held, self.folder / place / files.model)
        self._digests[f"{place}/{files.model}"] = ""
        return held.name

    def _rewrite(self, graph: Path, read: set[Range], source: Path, held: _Weights, target: Path) -> None:
        from slipcast_compiler.graph.weights import move_weights

        if held.ranges is None:
            move_weights(graph, target, held.name, lambda offset, length: offset)
            return
        ranges = held.ranges
        for each in sorted(read - ranges.keys()):
            ranges[each] = append(source, *each, target.with_name(held.name))
        move_weights(graph, target, held.name, lambda offset, length: ranges[offset, length])


def _content(files: EngineFiles, digests: Mapping[str, str]) -> tuple[str | None, ...]:
    return digests[files.model], digests[files.weights] if files.weights else None
