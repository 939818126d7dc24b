"""Open and check a bundle: the deployable directory of manifest.json and the plain files that it lists.

Nothing in a bundle is trusted. Names, kinds and sizes of all files are checked by looking at directory entries only;
then the files that are about to be used are hashed; only what passed is parsed further. Links are not followed,
special files are not opened, nothing is written.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from slipcast.bundle.irfile import check_ir
from slipcast.bundle.kinds import check_collisions, check_kind, check_name, refuse, refuse_code
from slipcast.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, not_sampled, read_any_manifest
from slipcast.bundle.onnxfile import check_external_data
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.records import BaseManifest
from slipcast.bundle.tensorfile import read_header
from slipcast.bundle.validation import MAX_JSON_BYTES, bundle_path
from slipcast.errors import ArtifactError

Progress = Callable[[int, int], None]
Files = Iterable[str] | Literal["all"]
Choice = Files | Callable[[BaseManifest], Iterable[str]]


class BundleFile:
    """A listed file, held open: what is read is what was verified, whatever becomes of its name in the meantime.

    Every reading is into memory and compared with the manifest's digest. A file that was mapped instead would end the
    process where it is truncated, and could be written to after its check.
    """

    def __init__(self, root: Path, entry: FileEntry) -> None:
        self.entry = entry
        with _open_plain(root, entry.path) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._one_reader = threading.Lock()
        self._last: Callable[[], npt.NDArray[np.uint8] | None] = lambda: None

    @property
    def name(self) -> str:
        """Without the folder."""
        return PurePosixPath(self.entry.path).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.entry.path).stem

    def read(self) -> npt.NDArray[np.uint8]:
        """The content, read-only; the same array for all who have it at a time. ArtifactError where it has changed."""
        with self._one_reader:
            if (array := self._last()) is None:
                array = self._read()
                self._last = weakref.ref(array)
            return array

    def read_bytes(self) -> bytes:
        """The content, as Path.read_bytes."""
        return self.read().tobytes()

    def _read(self) -> npt.NDArray[np.uint8]:
        _check_size(self.entry.path, self.entry.size, os.fstat(self._descriptor).st_size)
        array, done = np.empty(self.entry.size, np.uint8), 0
        try:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            with open(self._descriptor, "rb", buffering=0, closefd=False) as file:
                while done < len(array) and (count := file.readinto(memoryview(array.data)[done:])):
                    done += count
        except OSError as error:
            raise _unreadable(self.entry.path, error) from None
        _check_size(self.entry.path, self.entry.size, done)
        if (digest := hashlib.sha256(array.data).hexdigest()) != self.entry.sha256:
            problem = f"{self.entry.path}: changed since the bundle was opened"
            raise refuse(problem, f"sha256 {self.entry.sha256}", f"sha256 {digest}", "verify the bundle, and load it")
        array.flags.writeable = False
        return array


@dataclass(frozen=True)
class BaseBundle:
    """An opened bundle, of either kind; `root` is absolute and free of links."""

    root: Path
    manifest: BaseManifest
    _files: dict[str, BundleFile] = field(default_factory=dict, repr=False, compare=False)

    def file(self, relative: str) -> BundleFile:
        """A listed file, opened when it is first asked for, and from then on the same one."""
        if relative not in self._files:
            self._files[relative] = BundleFile(self.root, self.entry(relative))
        return self._files[relative]

    def path(self, relative: str) -> Path:
        """Where a listed file lies; ArtifactError for a file that the manifest does not list."""
        return self.root / self.entry(relative).path

    def entry(self, relative: str) -> FileEntry:
        """The manifest's record of a file; ArtifactError for a file that it does not list."""
        for entry in self.manifest.files:
            if entry.path == relative:
                return entry
        raise refuse(f"{relative!r}: not in the bundle", f"a file listed in {MANIFEST_NAME}", "a name that is not")


@dataclass(frozen=True)
class Bundle(BaseBundle):
    """One that samples with our samplers."""

    manifest: Manifest


@dataclass(frozen=True)
class ProgramBundle(BaseBundle):
    """One of a captured program."""

    manifest: ProgramManifest


def open_any_bundle(
    path: str | os.PathLike[str], *, allow_unlisted: bool = False, files: Choice = ()
) -> Bundle | ProgramBundle:
    """Check the structure of a bundle, and the contents of `files`: "all", or those about to be used,
    by name or as a function of the manifest.

    `allow_unlisted` tolerates files that the manifest does not list, but neither links nor formats that carry code.
    Raises ArtifactError for whatever is wrong.
    """
    manifest = read_any_manifest(_read_manifest_file(root := _resolve_root(path)))
    bundle = ProgramBundle(root, manifest) if isinstance(manifest, ProgramManifest) else Bundle(root, manifest)
    for entry in manifest.files:
        check_name(entry.path)
    _compare(root, {entry.path: entry.size for entry in manifest.files}, allow_unlisted)
    check_digests(bundle, files(manifest) if callable(files) else files)
    for entry in manifest.files:
        if entry.path.endswith(".safetensors"):
            read_header(root / entry.path)
    return bundle


def open_bundle(path: str | os.PathLike[str], *, allow_unlisted: bool = False, files: Choice = ()) -> Bundle:
    """As open_any_bundle; RequestError where it is that of a captured program."""
    bundle = open_any_bundle(path, allow_unlisted=allow_unlisted, files=files)
    if isinstance(bundle, ProgramBundle):
        raise not_sampled(bundle.manifest)
    return bundle


def check_digests(bundle: BaseBundle, files: Files = "all", progress: Progress | None = None) -> None:
    """Compare `files` with the manifest, and look whether the graphs among them are what their engines open, and where
    they keep their weights.

    All sizes are compared before the first file is hashed; `progress` gets (bytes done, bytes in all) after each.
    What a model reads is compared too. Raises ArtifactError that names the file and both digests.
    """
    chosen = bundle.manifest.files if files == "all" else [bundle.entry(name) for name in dict.fromkeys(files)]
    _hash(bundle.root, chosen, progress)
    listed = {entry.path: entry.size for entry in bundle.manifest.files}
    graphs = _graphs(bundle.manifest)
    used = set[str]()
    for entry in chosen:
        if entry.path.endswith(".onnx"):
            read = check_external_data(bundle.root / entry.path, bundle.root, listed)
            if entry.path in graphs and (others := read - {graphs[entry.path]}):
                wanted = graphs[entry.path] or "no other file"
                raise refuse(f"{entry.path}: reads weights of another file", wanted, ", ".join(sorted(others)))
            used |= read
    _hash(bundle.root, [bundle.entry(name) for name in used.difference(entry.path for entry in chosen)], None)
    for entry in chosen:
        if entry.path.endswith(".xml") and entry.path in graphs:
            weights = graphs[entry.path]
            check_ir(bundle.file(entry.path).read_bytes(), entry.path, weights, listed[weights] if weights else 0)


def _graphs(manifest: BaseManifest) -> dict[str, str | None]:
    """The engines' models, each with its file of weights."""
    engines = [files for target in manifest.targets for files in target.components.values()]
    return {files.model: files.weights for files in engines}


def file_entries(root: Path, paths: Iterable[str]) -> tuple[FileEntry, ...]:
    """Manifest entries of files below `root`, sorted by path; what opening would refuse is refused here too."""
    entries = []
    for name in sorted(set(paths)):
        try:
            bundle_path(name)
        except ValueError as error:
            raise refuse(f"{name!r}: bad path", "a relative path for any system", error, "rename it") from None
        check_name(name)
        size = _plain(root, name).lstat().st_size
        entries.append(FileEntry(path=name, size=size, sha256=_sha256(root, name)))
    check_collisions([MANIFEST_NAME, *(entry.path for entry in entries)])
    return tuple(entries)


def _resolve_root(path: str | os.PathLike[str]) -> Path:
    """The bundle's directory without links: the way to a bundle may be a link, nothing inside it may."""
    try:
        root = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        got = getattr(error, "strerror", None) or error
        raise refuse(f"{path}: cannot be opened", "a bundle directory", got, "check the path") from None
    if not root.is_dir():
        hint = "give the directory; unpack archives first"
        raise refuse(f"{path}: not a bundle", f"a directory that holds {MANIFEST_NAME}", "a file", hint)
    return root


def _read_manifest_file(root: Path) -> bytes:
    if not os.path.lexists(root / MANIFEST_NAME):
        got, hint = f"a directory without {MANIFEST_NAME}", "check the path"
        if os.path.lexists(root / "model_index.json"):
            got, hint = "a diffusers checkpoint", "make a bundle of it with `slipcast compile`"
        raise refuse(f"{root}: not a bundle", f"a directory that holds {MANIFEST_NAME}", got, hint)
    with _open_plain(root, MANIFEST_NAME) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise refuse(f"{MANIFEST_NAME}: too large", f"at most {MAX_JSON_BYTES} bytes", f"{size} bytes")
        return file.read(MAX_JSON_BYTES + 1)


def _compare(root: Path, listed: dict[str, int], allow_unlisted: bool) -> None:
    """What lies on the disk against what is listed."""
    found: dict[str, int] = {}
    for name, size in _walk(root):
        if name not in listed and name != MANIFEST_NAME and not allow_unlisted:
            hint = "remove it, or allow it with --allow-unlisted if you know where it comes from"
            raise refuse(f"{name!r}: not listed in {MANIFEST_NAME}", "listed files only", "one more", hint)
        found[name] = size
    check_collisions(found)
    for name, size in listed.items():
        if name not in found:
            raise refuse(f"{name}: missing", f"a file of {size} bytes", "no such file")
    for name, size in listed.items():
        _check_size(name, size, found[name])


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """(path relative to root, size) of all files; anything but plain files and directories is refused unopened."""
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            for entry in entries:
                name, status = folder + entry.name, entry.stat(follow_symlinks=False)
                check_kind(name, status.st_mode)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(f"{name}/")
                else:
                    refuse_code(name)
                    yield name, status.st_size
        except OSError as error:
            raise _unreadable(folder or str(root), error) from None


def _hash(root: Path, entries: Sequence[FileEntry], progress: Progress | None) -> None:
    for entry in entries:
        _check_size(entry.path, entry.size, _plain(root, entry.path).lstat().st_size)
    done, total = 0, sum(entry.size for entry in entries)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        # hashlib releases the interpreter lock, so threads hash at the speed of all cores or of the disk.
        digests = pool.map(lambda entry: _sha256(root, entry.path), entries)
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.sha256:
                pool.shutdown(wait=False, cancel_futures=True)
                problem = f"{entry.path}: content differs from {MANIFEST_NAME}"
                raise refuse(problem, f"sha256 {entry.sha256}", f"sha256 {digest}")
            done += entry.size
            if progress:
                progress(done, total)


def _check_size(name: str, expected: int, got: int) -> None:
    if expected != got:
        problem = f"{name}: {'truncated' if got < expected else 'too long'}"
        raise refuse(problem, f"{expected} bytes", f"{got} bytes")


def _plain(root: Path, name: str) -> Path:
    """The path of a plain file that no link leads to."""
    path = root
    try:
        for part in name.split("/"):
            path = path / part
            mode = path.lstat().st_mode
            check_kind(name, mode)
    except OSError as error:
        raise _unreadable(name, error) from None
    if not stat.S_ISREG(mode):
        raise refuse(f"{name!r}: not a file", "a plain file", "a directory")
    return path


def _open_plain(root: Path, name: str) -> BufferedReader:
    # Not following and not blocking, in case it was replaced by a link or a FIFO since it was looked at.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        return open(os.open(_plain(root, name), flags), "rb")
    except OSError as error:
        raise _unreadable(name, error) from None


def _sha256(root: Path, name: str) -> str:
    try:
        with _open_plain(root, name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: OSError) -> ArtifactError:
    return refuse(f"{name!r}: cannot be read", "a readable file", error.strerror or error)
