"""The build cache: what a stage made, under the hash of everything that went in. Never a file's existence."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache as remember
from pathlib import Path
from typing import Any

logger = logging.getLogger("slipcast")

RECORD = "entry.json"
TOOLS = (
    "torch", "diffusers", "transformers", "tokenizers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino",
    "tensorrt-rtx", "tensorrt", "numpy", "accelerate",
)  # fmt: skip


@remember
def tool_versions() -> dict[str, str]:
    """Versions of the libraries whose work is cached, and a digest of the compiler's own code."""
    versions = {}
    for tool in TOOLS:
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            versions[tool] = "absent"
    code = hashlib.sha256()
    import slipcast

    for root in (Path(__file__).parent, Path(slipcast.__file__).parent):
        for file in sorted(root.rglob("*.py")):
            code.update(file.read_bytes())
    return {**versions, "slipcast": code.hexdigest()}


class Cache:
    """Directories named by the hash of their inputs. An entry is complete and verified, or it is rebuilt."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, kind: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """The entry's directory; `build` fills a new one if there is none. `inputs` has to be JSON."""
        key = hashlib.sha256(json.dumps([kind, inputs, tool_versions()], sort_keys=True).encode()).hexdigest()
        entry = self.root / f"{kind}-{key[:32]}"
        if entry.exists():
            if _intact(entry):
                return entry
            bad = Path(tempfile.mkdtemp(prefix=f"{entry.name}.bad-", dir=self.root)) / entry.name
            os.replace(entry, bad)
            logger.warning("cache entry %s is damaged: kept as %s, built again", entry.name, bad.parent.name)
        self.root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=self.root))
        try:
            build(work)
            made = sorted(file for file in work.rglob("*") if file.is_file())
            files = {file.relative_to(work).as_posix(): _digest(file) for file in made}
            (work / RECORD).write_text(json.dumps({"inputs": inputs, "files": files}, indent=1))
            work.chmod(0o755)  # mkdtemp makes it private
            try:
                os.replace(work, entry)
            except OSError:  # another compile was faster; its entry is as good
                if not _intact(entry):
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return entry


def _intact(entry: Path) -> bool:
    try:
        files = json.loads((entry / RECORD).read_text())["files"]
        return all(_digest(entry / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
