"""The files of a bundle by content: what two engines have in common lies there once, and the manifest says so twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slipcast.bundle.manifest import EngineFiles
from slipcast_compiler.engines.sharing import Range, digest_ranges, move_ranges, ranges_of, stem_of
from slipcast_compiler.host.cache import RECORD
from slipcast_compiler.host.files import append, copy

MOST = 0.5  # of the bytes that an engine reads: it shares another's file that has as many of them


@dataclass
class _Weights:
    """A file of weights in the bundle, of one in the cache: `ranges`, where those of that one lie in it. None: all, and
    where they were. `shared`: whether it is another engine's, which has the same under some ranges."""

    name: str
    ranges: dict[Range, int] | None = field(default_factory=dict)
    shared: bool = False


class Pool:
    """A bundle's directory, to which engines are added.

    Engines of one target that read one file of weights, as parts of a graph do, have it there once, and in it only what
    they read: it is in the cache with the weights of all parts, also of those that are not shipped. So have engines of
    one component for several sizes, whatever file each has its weights in. A bundle's files are its own: whoever has it
    may write to them, and nobody may write to those of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[str | None, ...], EngineFiles] = {}
        self._digests: dict[str, str] = {}  # by path, of what was copied; "" of what was put together here
        self._weights: dict[tuple[str, str], _Weights] = {}  # by place, and digest in the cache
        self._siblings: dict[tuple[str, str], list[EngineFiles]] = {}  # by place and stem, engines that are there
        self._found: dict[str, dict[Range, bytes]] = {}  # by engine that is there, the digests of what it reads

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
            if weights and files.model.endswith((".onnx", ".xml")):
                weights = self._add_graph(entry, files, digests, place)
            else:
                for name in filter(None, (files.model, weights)):
                    self._copy(entry / name, f"{place}/{name}", digests[name])
            placed = f"{place}/{files.model}", weights and f"{place}/{weights}"
            self._known[content] = made = EngineFiles(model=placed[0], weights=placed[1])
            self._siblings.setdefault((place, stem_of(files.model)), []).append(made)
        return self._known[content]

    def _copy(self, source: Path, path: str, digest: str) -> None:
        if path not in self._digests:
            copy(source, self.folder / path)
        assert self._digests.setdefault(path, digest) == digest, f"{path} is another engine's already"

    def _add_graph(self, entry: Path, files: EngineFiles, digests: Mapping[str, str], place: str) -> str:
        """A graph, with what it reads of its weights; returns the name of the file that these are in."""
        assert files.weights
        source, digest = entry / files.weights, digests[files.weights]
        read = ranges_of(entry / files.model)
        if (place, digest) not in self._weights:
            self._weights[place, digest] = self._share(files, source, read, place) or self._place(
                files, source, digest, read, place
            )
        held = self._weights[place, digest]
        if held.ranges is None and held.name == files.weights:
            self._copy(entry / files.model, f"{place}/{files.model}", digests[files.model])
            return held.name
        self._rewrite(entry / files.model, read, source, held, self.folder / place / files.model)
        self._digests[f"{place}/{files.model}"] = ""
        return held.name

    def _place(self, files: EngineFiles, source: Path, digest: str, read: set[Range], place: str) -> _Weights:
        """A file of their own for weights, as they are if the graph reads all; OpenVINO's are of one graph alone."""
        assert files.weights
        names = (files.weights, f"{files.model}.data", *(f"{files.model}.{i}.data" for i in range(99)))
        name = next(n for n in names if self._digests.get(f"{place}/{n}", digest) == digest)
        whole = files.model.endswith(".xml") or sum(length for _, length in read) == source.stat().st_size
        if whole:
            self._copy(source, f"{place}/{name}", digest)
        else:
            self._digests[f"{place}/{name}"] = ""
        return _Weights(name, None if whole else {})

    def _share(self, files: EngineFiles, source: Path, read: set[Range], place: str) -> _Weights | None:
        """The file of an engine of the same component that has most of what this one reads, if there is one."""
        siblings = self._siblings.get((place, stem_of(files.model)), ())
        if not (names := dict.fromkeys(sibling.weights for sibling in siblings if sibling.weights)):
            return None
        mine = digest_ranges(source, read)
        least = max(MOST * sum(size for _, size in mine), 1)
        for name in names:
            held = self._held(name)
            if sum(size for (_, size), digest in mine.items() if digest in held) >= least:
                return _Weights(Path(name).name, {}, shared=True)
        return None

    def _held(self, weights: str) -> dict[bytes, int]:
        """By content, where something lies that engines read of a file of weights."""
        held: dict[bytes, int] = {}
        for engine in self._known.values():
            if engine.weights == weights:
                if engine.model not in self._found:
                    ranges = ranges_of(self.folder / engine.model)
                    self._found[engine.model] = digest_ranges(self.folder / weights, ranges)
                held |= {digest: offset for (offset, _), digest in self._found[engine.model].items()}
        return held

    def _rewrite(self, graph: Path, read: set[Range], source: Path, held: _Weights, target: Path) -> None:
        if held.ranges is None:
            move_ranges(graph, target, held.name, lambda offset, length: offset)
            return
        ranges, missing = held.ranges, sorted(read - held.ranges.keys())
        path = f"{target.parent.name}/{held.name}"
        if held.shared and missing:
            there = self._held(path)
            found = digest_ranges(source, missing).items()
            ranges |= {each: there[digest] for each, digest in found if digest in there}
        for each in missing:
            if each not in ranges:
                ranges[each] = append(source, *each, self.folder / path)
                self._digests[path] = ""
        move_ranges(graph, target, held.name, lambda offset, length: ranges[offset, length])


def _content(files: EngineFiles, digests: Mapping[str, str]) -> tuple[str | None, ...]:
    return digests[files.model], digests[files.weights] if files.weights else None
