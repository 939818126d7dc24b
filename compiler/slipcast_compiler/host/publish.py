"""Make a directory beside its destination, and publish it in one rename. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import MANIFEST_NAME, Manifest
from slipcast.bundle.reader import file_entries
from slipcast.errors import RecipeError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # renameat2(2), of Linux


@contextlib.contextmanager
def workspace(output: Path, index: str = MANIFEST_NAME) -> Iterator[Path]:
    """An empty directory on the output's file system; gone afterwards, unless it was published."""
    check_output(output, index)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=output.parent))
    except OSError as error:
        raise _cannot_be_made(output, output.parent, error) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _cannot_be_made(output: Path, parent: Path, error: OSError) -> RecipeError:
    return RecipeError(
        f"{output} cannot be made", expected="a directory that can be written to", got=f"{parent}: {error.strerror}"
    )


def _any_inside(path: Path) -> bool:
    """Whether it is a file, or a directory with something in it."""
    return not path.is_dir() or next(path.iterdir(), None) is not None


def write_manifest(folder: Path, fields: dict[str, Any]) -> Manifest:
    """Write manifest.json: `fields`, and the digests of all files that are there now."""
    paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST_NAME]
    manifest = Manifest(**fields, files=file_entries(folder, paths))
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def publish(folder: Path, output: Path, index: str = MANIFEST_NAME) -> None:
    """Make the finished directory the output, in one rename: whoever looks sees the old bundle or the new one."""
    os.chmod(folder, 0o755)  # mkdtemp makes it private
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)
    check_output(output, index)
    if output.exists():
        _exchange(folder, output)  # the old bundle is removed with the workspace
    else:
        os.replace(folder, output)
    _sync(output.parent)


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
