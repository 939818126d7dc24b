"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipcast.errors import ArtifactError

INDEXES = ("model_index.json", "modular_model_index.json")  # of pipelines, and of those that are made of blocks
MAX_CONFIG_BYTES = 64 << 20  # an index of shards names every tensor


def index_file(root: Path) -> Path:
    """Of a diffusers directory. One that has both is a pipeline without blocks, and may be opened as one of blocks."""
    return next((root / name for name in INDEXES if (root / name).is_file()), root / INDEXES[0])


def read_index(root: Path) -> dict[str, Any]:
    """The index of a diffusers directory: its class, and [library, class] of its components. A pipeline of blocks says
    besides where each is loaded from; those in the directory itself count."""
    entries = read_json(index_file(root)).items()
    return {name: entry[:2] if _is_loaded_from(entry) else entry for name, entry in entries}


def _is_loaded_from(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of a checkpoint, which may hold what Python's json writes: NaN and Infinity, too.

    diffusers writes -Infinity for a scheduler's lambda_min_clipped. ArtifactError for anything else.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ArtifactError(f"{path}: too large", expected=f"at most {MAX_CONFIG_BYTES} bytes")
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: not found", expected="a diffusers directory with model_index.json",
            hint="check the path; in a recipe, model.path is relative to it",
        ) from None  # fmt: skip
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read", got=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON", got=str(error)[:200], hint="download it again") from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: not an object", got=type(document).__name__)
    return document
