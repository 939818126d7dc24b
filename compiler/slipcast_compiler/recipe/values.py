"""Types of values in recipes."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# TOML has one kind of array, so tuples have to be taken from lists in strict mode too.
AsTuple = BeforeValidator(_as_tuple)
Texts = Annotated[tuple[str, ...], AsTuple]
Numbers = Annotated[tuple[float, ...], AsTuple]
Images = Annotated[int, Field(ge=1, le=100_000)]  # how many are drawn, or prompts taken
Side = Annotated[int, Field(ge=8, le=16_384)]  # of a picture, in pixels


def read_plain(file: Path, limit: int) -> bytes:
    """A plain file of at most `limit` bytes; ValueError for other kinds, which might never end, and larger ones."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{file}: a directory")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > limit:
            raise ValueError(f"{status.st_size} bytes, and at most {limit} are read")
        return opened.read(limit)
