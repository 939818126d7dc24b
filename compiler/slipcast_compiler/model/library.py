"""Classes of diffusers and transformers, by name."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from slipcast.errors import ArtifactError
from slipcast_compiler.host.quiet import quiet


def library_class(library: str, name: str) -> Any:
    """A class of diffusers or transformers by name; ArtifactError where the installed version has none."""
    import torch  # noqa: F401 - where it is missing, that is the error, and not what diffusers makes of it

    with quiet():
        found = getattr(importlib.import_module(library), name, None)
    if found is None:
        version = importlib.metadata.version(library)
        raise ArtifactError(f"{library} {version} has no class {name}", hint=f"pip install --upgrade {library}")
    return found
