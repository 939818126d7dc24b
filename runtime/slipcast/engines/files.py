"""Files that engines are made of: of a bundle, which is read whole and hashed, or one's own on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipcast.bundle.reader import BundleFile

ModelFile = Path | BundleFile


def contents(file: ModelFile) -> npt.NDArray[np.uint8]:
    """All bytes of a file, in memory: an engine that mapped it would end with it where it is truncated."""
    return np.fromfile(file, np.uint8) if isinstance(file, Path) else file.read()
