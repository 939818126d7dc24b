"""Files that are needed in two places: as one, where nobody writes in place, or as a copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CHUNK = 1 << 24
ALIGNED = 64  # bytes: engines may read numbers, or vectors of them, where they are


def link(source: Path, target: Path) -> None:
    """The same file under another name, inside the cache; a copy where the disk does not allow it."""
    if target.exists() and target.samefile(source):
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def copy(source: Path, target: Path) -> None:
    """A file of its own, with the same blocks where the disk can share them until one is written."""
    with source.open("rb") as reader, target.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left and (done := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                left -= done
        except (AttributeError, OSError):  # another system; or a disk, or two, that the kernel does not do it for
            pass
    if left:
        shutil.copyfile(source, target)


def append(source: Path, begin: int, length: int, target: Path) -> int:
    """Add a range of bytes to the end of a file, at a multiple of ALIGNED; returns where it lies there."""
    with source.open("rb") as reader, target.open("ab") as writer:
        writer.write(bytes(-writer.seek(0, os.SEEK_END) % ALIGNED))
        place, left = writer.tell(), length
        reader.seek(begin)
        while left:
            if not (piece := reader.read(min(left, CHUNK))):
                raise EOFError(f"{source} ends before byte {begin + length}")
            left -= writer.write(piece)
    return place
