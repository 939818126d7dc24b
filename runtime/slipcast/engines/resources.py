"""Memory and disk that ran out, as the libraries say it: each has an error, or only words, of its own."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from slipcast.errors import ResourceError, SlipcastError

# Engines raise RuntimeErrors of their own, in which the libraries' words are all there is to tell.
_MEMORY = re.compile(
    r"out of memory|not enough memory|bad_alloc|std::bad_array_new_length|(fail\w*|cannot|could not|unable to) "
    r".{0,20}(allocat|map memory|map segment)|allocat\w+ fail|can't (start new|alloc)|resource temporarily unavailable",
    re.IGNORECASE,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SMALLER = 'free some memory, or keep less in it: residency="sequential" (--residency sequential), fewer images at once'


def out_of_memory(error: BaseException) -> bool:
    """Whether it failed because memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(_MEMORY.search(str(error)))


def disk_full(error: BaseException) -> bool:
    """Whether it failed because the disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def check_space(place: Path, needed: int, what: str) -> None:
    """ResourceError where less than `needed` bytes are free where `place` is, or will be; before anything is made."""
    folder = next(each for each in (place.absolute(), *place.absolute().parents) if each.is_dir())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ResourceError(
            f"{what}: the disk is too full",
            expected=f"about {needed / 1e6:.1f} MB",
            got=f"{free / 1e6:.1f} MB free in {folder}",
            hint="free that much, or write to another disk",
        )


def as_resource_error(error: BaseException, doing: str) -> ResourceError | None:
    """The error to raise in place of one that means a lack of memory or disk; None for others."""
    if isinstance(error, SlipcastError):
        return None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    got = next(filter(_MEMORY.search, lines), lines[0])[:500]  # libraries begin with where in their code it was
    if disk_full(error):
        place = getattr(error, "filename", None)
        hint = f"free some space{f' where {place} is' if place else ''}, or write to another disk"
        return ResourceError(f"the disk is full: {doing}", got=got, hint=hint)
    if out_of_memory(error):
        return ResourceError(f"memory ran out: {doing}", got=got, hint=SMALLER)
    return None
