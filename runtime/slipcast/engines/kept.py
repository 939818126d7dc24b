"""Compiled graphs, kept on this host from one process to the next, where SLIPCAST_ENGINE_CACHE names a directory.

What is kept is what an engine's library wrote, and it reads that without a check of its own: so the directory has to be
the user's alone, each file begins with the SHA-256 of the rest, and its name says what it was made of. A file that is
not as it should be is made again. Nothing is ever removed: whoever names the directory empties it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from slipcast.errors import HostError

VARIABLE = "SLIPCAST_ENGINE_CACHE"
DIGEST_BYTES = 32

logger = logging.getLogger("slipcast")


def find(key: str) -> bytes | None:
    """What was stored under the key, which says all that it depends on; None where nothing was, or nowhere is to look.

    HostError where the directory is not the user's alone.
    """
    if (file := _file(key)) is None:
        return None
    with suppress(OSError):
        content = file.read_bytes()
        if hashlib.sha256(content[DIGEST_BYTES:]).digest() == content[:DIGEST_BYTES]:
            return content[DIGEST_BYTES:]
        logger.warning("%s is damaged: it is made again", file)
    return None


def store(key: str, make: Callable[[], bytes]) -> None:
    """Keep what make() gives, where there is a directory for it; a full disk is no error."""
    if (file := _file(key)) is None:
        return
    made = make()
    try:
        with NamedTemporaryFile(dir=file.parent, prefix=".making-", delete=False) as part:
            try:
                part.write(hashlib.sha256(made).digest())
                part.write(made)
                part.flush()
                os.replace(part.name, file)
            except BaseException:
                Path(part.name).unlink()
                raise
    except OSError as error:
        logger.warning("%s: a compiled graph cannot be kept: %s", file.parent, error.strerror)


def _file(key: str) -> Path | None:
    """Where it is kept, in a directory that is made where it is not there; None where none is named."""
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise HostError(f"{VARIABLE}: {folder} cannot be used", got=error.strerror) from None
    own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    if not own or status.st_mode & 0o022:
        raise HostError(
            f"{VARIABLE}: others can write to {folder}",
            expected="a directory of this user alone: what is in it is run",
            got=f"mode {status.st_mode & 0o777:o}, owner {status.st_uid}",
            hint=f"chmod 700 {folder}",
        )
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.blob"
