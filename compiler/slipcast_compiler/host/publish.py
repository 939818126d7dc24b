"""Make a directory beside its destination, and publish it in one rename. Nothing here needs torch.

Two writers of one place take turns by a lock. Where locks lie, as they do on some network disks, the rename itself
tells: what it displaced is compared with what was there when the work began, and put back where somebody else changed
it in the meantime.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from slipcast.bundle.manifest import MANIFEST_NAME, Manifest
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import file_entries
from slipcast.bundle.records import BaseManifest, FileEntry
from slipcast.engines.resources import as_resource_error, disk_full
from slipcast.errors import CheckFailed, RecipeError, SlipcastError

logger = logging.getLogger("slipcast")
M = TypeVar("M", bound=BaseManifest)

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # renameat2(2), of Linux

_states: dict[tuple[int, Path], str | None] = {}  # of the outputs that a thread has locked, as they are to be found


@contextlib.contextmanager
def workspace(output: Path, index: str = MANIFEST_NAME) -> Iterator[Path]:
    """An empty directory on the output's file system; gone afterwards, unless it was published. Locks the output."""
    with locked(output, index):
        prefix = f".{output.name}.part-"
        for left in output.parent.glob(f"{glob.escape(prefix)}*"):  # by a run that was killed: we have its lock
            shutil.rmtree(left, ignore_errors=True)
        try:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        except OSError as error:
            raise _cannot_be_made(output, output.parent, error) from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(output: Path, index: str = MANIFEST_NAME) -> Iterator[None]:
    """Nobody else writes to the output within the block: who comes second waits, and says for which process. The state
    that `publish` expects there is that of the beginning. Of one thread, a block may lie within another."""
    check_output(output, index)
    place = output.resolve()
    key = threading.get_ident(), place
    if key in _states:
        yield
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_made(output, output.parent, error) from None
    with _lock(place):
        _states[key] = _state(place, index)
        try:
            yield
        finally:
            del _states[key]


@contextlib.contextmanager
def _lock(place: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    file = place.with_name(f".{place.name}.lock")
    lock = FileLock(file)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.warning("%s is being written to by %s: waiting for it to end", place, _holder(file))
            lock.acquire()
        file.write_text(str(os.getpid()))
    except OSError as error:  # a disk without locks
        if disk_full(error):
            raise
        logger.warning("%s: cannot be locked here (%s); going on without", place, error.strerror)
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)  # those who wait look whether theirs is the file of this name
            lock.release()


def _holder(file: Path) -> str:
    try:
        return f"process {int(file.read_text())}"
    except (OSError, ValueError):
        return "another process"


def _state(folder: Path, index: str) -> str | None:
    """What tells one content of the output from another: its index has the digests of all else."""
    try:
        return hashlib.sha256((folder / index).read_bytes()).hexdigest()
    except OSError:
        return None


def check_output(output: Path, index: str = MANIFEST_NAME) -> None:
    """RecipeError where the output cannot be made, or is not a bundle (or what else has this index file), and so not
    ours to replace."""
    occupied = output.exists() and not (output / index).is_file() and _any_inside(output)
    if output.is_symlink() or occupied:
        kind = Path(index).stem.replace("manifest", "bundle")
        raise RecipeError(f"{output} exists and is not a {kind}", expected=f"a new directory, or a {kind} to replace")
    parent = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    try:  # and not os.access, which promises root everything, /proc too
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent).cleanup()
    except OSError as error:
        raise _cannot_be_made(output, parent, error) from None


def _cannot_be_made(output: Path, parent: Path, error: OSError) -> SlipcastError:
    if lack := as_resource_error(error, f"{output} cannot be made"):
        return lack
    return RecipeError(
        f"{output} cannot be made", expected="a directory that can be written to", got=f"{parent}: {error.strerror}"
    )


def _any_inside(path: Path) -> bool:
    """Whether it is a file, or a directory with something in it."""
    return not path.is_dir() or next(path.iterdir(), None) is not None


def write_manifest(folder: Path, fields: dict[str, Any]) -> Manifest:
    """Write manifest.json: `fields`, and the digests of all files that are there now."""
    return _write(folder, Manifest(**fields, files=_entries(folder)))


def write_program_manifest(folder: Path, fields: dict[str, Any]) -> ProgramManifest:
    """As write_manifest, of a captured program."""
    return _write(folder, ProgramManifest(**fields, files=_entries(folder)))


def _write(folder: Path, manifest: M) -> M:
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def _entries(folder: Path) -> tuple[FileEntry, ...]:
    paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST_NAME]
    return file_entries(folder, paths)


def publish(folder: Path, output: Path, index: str = MANIFEST_NAME) -> None:
    """Make the finished directory the output, in one rename: whoever looks sees the old bundle or the new one."""
    os.chmod(folder, 0o755)  # mkdtemp makes it private
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)
    check_output(output, index)
    place = output.resolve()
    key = threading.get_ident(), place
    expected = _states[key] if key in _states else _state(place, index)
    if output.exists():
        _exchange(folder, output)  # the old bundle is removed with the workspace
        if (found := _state(folder, index)) != expected:
            _exchange(folder, output)
            raise _changed(output, expected, found)
    else:
        try:
            os.rename(folder, output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise _changed(output, expected, _state(place, index)) from None
    _sync(output.parent)
    if key in _states:
        _states[key] = _state(place, index)


def _changed(output: Path, expected: str | None, found: str | None) -> CheckFailed:
    return CheckFailed(
        f"{output} was changed by another process while this one worked; nothing was published",
        expected=f"index {expected[:16]}" if expected else "nothing there",
        got=f"index {found[:16]}" if found else "something else",
        hint="run the same command again: it goes on from what is there now, and from the cache",
    )


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories: at once where the system can, else by way of a third name, and back where that fails."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename and rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return
    aside = a.with_name(f"{a.name}.old")
    os.replace(b, aside)
    try:
        os.replace(a, b)
    except BaseException:
        os.replace(aside, b)
        raise
    os.replace(aside, a)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
