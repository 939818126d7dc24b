"""Files, complete or not at all; and what could not be written, said before the work."""

from __future__ import annotations

import os
from pathlib import Path

from slipcast.engines.resources import as_resource_error, check_space, disk_full
from slipcast.errors import RequestError


def write_whole(output: Path, data: bytes) -> None:
    """A file, complete or not at all. RequestError where it cannot be written, ResourceError where the disk is full."""
    target = output.resolve()
    apart = not target.exists() or target.is_file()  # a device is written to as it is
    part = target.with_name(f".{target.name[:100]}.{os.getpid()}.part") if apart else target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
        if apart:
            os.replace(part, target)
    except OSError as error:
        if disk_full(error):
            check_space(target.parent, len(data), str(output))
        if lack := as_resource_error(error, f"writing {output}, {len(data) / 1e6:.1f} MB"):
            raise lack from None
        raise RequestError(f"cannot write {output}: {error}") from None
    finally:
        if apart:
            part.unlink(missing_ok=True)


def is_directory(output: Path) -> bool:
    """Whether an output is to be a directory: it is one, or has no suffix."""
    return output.is_dir() or not output.suffix


def check_writable(output: Path) -> None:
    """RequestError where nothing can be written there."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if (nearest.is_file() and nearest != output) or not os.access(nearest, os.W_OK):
        raise RequestError(f"cannot write {output}: {nearest} cannot be written to")
