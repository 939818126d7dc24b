"""The build cache: what a stage made, under the hash of everything that went in. Never a file's existence.

What goes in: the inputs; the code that the stage can run, which is the closure of imports of the module it is in; and
the versions of the libraries that this code imports. An entry is moved into place whole, with a record of its files'
digests, and is compared with them when it is first used by a process, and whenever `verify` is asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache as remember
from pathlib import Path
from typing import Any

from slipcast_compiler.host.closure import Sources, origin, versions

logger = logging.getLogger("slipcast")

RECORD = "entry.json"
TOOLS = (
    "torch", "diffusers", "transformers", "tokenizers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino",
    "tensorrt-rtx", "tensorrt", "numpy", "accelerate",
)  # fmt: skip
SOURCES = Sources()

_hashed: dict[tuple[int, ...], str] = {}  # by what stat tells of a file; links to one are hashed once


@remember
def tool_versions() -> dict[str, str]:
    """Versions of the libraries that reports name, and a digest of all of the compiler's and the runtime's code."""
    now = Sources()  # as it is on the disk, which is not what this process has loaded if it was changed since
    return {**versions(TOOLS), "slipcast": now.digest(now.modules())}


@remember
def _code(modules: frozenset[str]) -> dict[str, str]:
    found = frozenset[str]().union(*map(SOURCES.closure, modules))
    python = ".".join(map(str, sys.version_info[:2]))
    return {**versions(SOURCES.libraries(found)), "python": python, "slipcast": SOURCES.digest(found)}


def code_of(build: Callable[..., Any], runs: Iterable[str] = ()) -> dict[str, str]:
    """Versions of the libraries that `build` can run, and a digest of the code; with that of the modules `runs`."""
    return _code(frozenset((SOURCES.name(origin(build)), *runs)))


@dataclass(frozen=True)
class Entry:
    """A directory of the cache. `digests`: of its files, by path within it; None where its record is damaged."""

    path: Path
    digests: dict[str, str] | None

    @property
    def kind(self) -> str:
        """The stage that made it."""
        return self.path.name.rpartition("-")[0]

    @property
    def size(self) -> int:
        """Bytes of all its files, whoever else has them."""
        return sum(file.stat().st_size for file in self.files())

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return time.time() - self.path.stat().st_mtime

    def files(self) -> list[Path]:
        """All that lie there."""
        return [file for file in self.path.rglob("*") if file.is_file()]

    def damage(self, digest: Callable[[Path], str]) -> str | None:
        """What is wrong with it, if anything."""
        if self.digests is None:
            return f"{RECORD} is not a record of files"
        for name, wanted in self.digests.items():
            try:
                if digest(self.path / name) != wanted:
                    return f"{name} has other content than was written"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return None


class Cache:
    """Directories named by the hash of their inputs. An entry is complete and as it was written, or it is rebuilt."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, kind: str, inputs: dict[str, Any], build: Callable[[Path], None], runs: Iterable[str] = ()) -> Path:
        """The entry's directory; `build` fills a new one if there is none. `inputs` has to be JSON.

        The key follows the code that `build` can run: see closure.py. `runs`: modules that it runs besides and that are
        imported by a name which is not in the source, such as an engine's.
        """
        code = code_of(build, runs)
        key = hashlib.sha256(json.dumps([kind, inputs, code], sort_keys=True).encode()).hexdigest()
        entry = self.root / f"{kind}-{key[:32]}"
        if entry.exists():
            if not (damage := read_entry(entry).damage(_digest_once)):
                return entry
            kept = _keep(entry)
            logger.warning("cache entry %s is damaged (%s): kept as %s, built again", entry.name, damage, kept.name)
        self.root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=self.root))
        try:
            build(work)
            made = sorted(file for file in work.rglob("*") if file.is_file())
            files = {file.relative_to(work).as_posix(): _digest_once(file) for file in made}
            (work / RECORD).write_text(json.dumps({"inputs": inputs, "code": code, "files": files}, indent=1))
            work.chmod(0o755)  # mkdtemp makes it private
            try:
                os.replace(work, entry)
            except OSError:  # another compile was faster; its entry is as good
                if read_entry(entry).damage(_digest_once):
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return entry

    def entries(self) -> Iterator[Entry]:
        """All that are there, but for damaged ones that were kept."""
        for path in sorted(self.root.glob("*-*")):
            if path.is_dir() and path.suffix == "" and not path.name.startswith("."):
                yield read_entry(path)

    def verify(self, advance: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
        """Hash everything; damaged entries, which are kept under another name, with what is wrong."""
        entries, found = list(self.entries()), {}
        for done, entry in enumerate(entries):
            advance(done, len(entries))
            if damage := entry.damage(_digest):
                found[entry.path.name] = damage
                _keep(entry.path)
        return found


def read_entry(path: Path) -> Entry:
    """Whatever its record holds."""
    try:
        files = json.loads((path / RECORD).read_bytes())["files"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        files = None
    good = isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
    return Entry(path, files if good else None)


def _keep(entry: Path) -> Path:
    """Move a damaged entry aside, for whoever wants to know what happened to it."""
    kept = Path(tempfile.mkdtemp(prefix=f"{entry.name}.bad-", dir=entry.parent))
    os.replace(entry, kept / entry.name)
    return kept


def _digest_once(file: Path) -> str:
    stat = file.stat()
    seen = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    if seen not in _hashed:
        _hashed[seen] = _digest(file)
    return _hashed[seen]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
