"""What a captured compile was made of, as digests. Nothing here needs torch: a benchmark asks on hosts too."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digests(call: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files, of pictures, that a call names."""
    given = [(name, each) for name, value in call.items() for each in (value if isinstance(value, list) else [value])]
    files = [(f"{name}[{at}]", Path(each)) for at, (name, each) in enumerate(given) if isinstance(each, str)]
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files if file.is_file()}


def digest(root: Path, pipeline: str | None) -> str:
    """SHA-256 over names and contents of a checkpoint's files, and over the module of a pipeline of the user's own.
    Hidden files, such as a download's own notes, do not count."""
    total = hashlib.sha256()
    found = [(file.relative_to(root), file) for file in sorted(root.rglob("*")) if file.is_file()]
    files = [(path.as_posix(), file) for path, file in found if not any(part.startswith(".") for part in path.parts)]
    module, _, _ = (pipeline or "").rpartition(":")
    if module:
        files.append((module, Path(inspect.getfile(importlib.import_module(module)))))
    for name, file in files:
        with file.open("rb") as stream:
            total.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
