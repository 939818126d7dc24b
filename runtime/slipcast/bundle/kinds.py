"""What may lie in a bundle: which kinds of files, under which names."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from pathlib import Path

from slipcast.bundle.validation import colliding
from slipcast.errors import ArtifactError

SUFFIXES = frozenset([".json", ".onnx", ".data", ".xml", ".bin", ".html", ".txt", ".png", ".safetensors", ".engine"])
_CODE = re.compile(
    r"\.(pickle|pkl|pt|pth|ckpt|joblib|py[cdo]?|pyw|so(\.[0-9]+)*|dll|dylib|exe|bat|cmd|sh)[. ]*$", re.IGNORECASE
)


def check_name(name: str) -> None:
    """ArtifactError where a file of this name is none of a bundle's."""
    refuse_code(name)
    if (suffix := Path(name).suffix) not in SUFFIXES:
        raise refuse(f"{name!r}: no kind of file for a bundle", " ".join(sorted(SUFFIXES)), suffix or "no suffix")


def refuse_code(name: str) -> None:
    """ArtifactError where opening such a file can run what it carries."""
    if match := _CODE.search(name):
        problem = f"{name!r}: refused, because opening a {match[0]} file can run code that it carries"
        hint = "remove it, and do not trust a bundle that came with it"
        raise refuse(problem, "weights as .safetensors, .onnx, .data, .bin or .engine", match[0], hint)


def check_kind(name: str, mode: int) -> None:
    """ArtifactError where it is neither a plain file nor a directory."""
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kinds = {stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        got = kinds.get(stat.S_IFMT(mode), "device")
        hint = "put the file itself there (cp -L copies what links point to)"
        raise refuse(f"{name!r}: {got} in a bundle", "plain files and directories", f"a {got}", hint)


def check_collisions(names: Iterable[str]) -> None:
    """ArtifactError where some file system would take two names for one."""
    if pair := colliding(names):
        expected = "names that differ in more than case or Unicode form"
        raise refuse("files that collide", expected, f"{pair[0]!r} and {pair[1]!r}", "rename one of them")


def refuse(
    problem: str, expected: object, got: object, hint: str = "copy the bundle again from where it was built"
) -> ArtifactError:
    """The error to raise for what is wrong with a bundle."""
    return ArtifactError(problem, expected=expected, got=got, hint=hint)
