"""A checkpoint as libraries look for it: links to the weights that are taken, under plain names, and to no others."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from slipcast.errors import RecipeError
from slipcast_compiler.model.configs import INDEXES, read_index, read_json
from slipcast_compiler.model.weight_files import STEMS, WeightFiles, find_weight_files, is_weights, variants_of


@contextmanager
def linked(root: Path, folders: Iterable[str], wish: str | None) -> Iterator[Path]:
    """A directory of links to model_index.json and these folders; no pickle is in it."""
    with TemporaryDirectory(prefix="slipcast-") as made:
        _link(root, folders, wish, Path(made))
        yield Path(made)


def plainly_named(root: Path, wish: str | None) -> Path:
    """The directory itself where all of its components have plain weights and none else are wished for; or one of
    links, which is there as long as this process. RecipeError where no component has the variant `wish`."""
    folders = _components(root)
    weighty = [folder for folder in folders if any(map(is_weights, (root / folder).iterdir()))]
    known = set[str]().union(*(variants_of(root / folder, read_json) for folder in weighty))
    check_variant(root.name, wish, known)
    if not wish and all("" in variants_of(root / folder, read_json) for folder in weighty):
        return root
    made = _lasting(root, wish)
    if not any(Path(made.name).iterdir()):
        _link(root, folders, wish, Path(made.name))
    return Path(made.name)


def link_plainly(root: Path, wish: str | None, made: Path) -> None:
    """Fill the empty directory `made` with links to all components, of the variant `wish` where they have it."""
    _link(root, _components(root), wish, made)


def check_variant(name: str, wish: str | None, known: set[str]) -> None:
    """RecipeError where no component of a checkpoint has the variant that it is to prefer."""
    if wish and wish not in known:
        raise RecipeError(
            f"model.variant: no component of {name} has such weights",
            expected=", ".join(sorted(known - {""})) or "no variant: there are plain files alone",
            got=wish,
        )


@functools.cache
def _lasting(root: Path, wish: str | None) -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="slipcast-")


def _components(root: Path) -> list[str]:
    entries = read_index(root).items()
    return [name for name, entry in entries if isinstance(entry, list) and entry[-1] and (root / name).is_dir()]


def _link(root: Path, folders: Iterable[str], wish: str | None, made: Path) -> None:
    for file in filter(Path.is_file, (root / name for name in INDEXES)):
        (made / file.name).symlink_to(file.absolute())
    index = read_index(root)
    for folder in folders:
        (made / folder).mkdir()
        files = list((root / folder).iterdir())
        for file in files:
            if not is_weights(file):
                (made / folder / file.name).symlink_to(file.absolute())
        if any(map(is_weights, files)):
            library = _library(index.get(folder), files)
            _link_weights(find_weight_files(root / folder, library, wish, read_json), library, made / folder)


def _library(entry: object, files: list[Path]) -> str:
    """Whose names a component's weights have: that of its class, or, of a pipeline's own, that of its files."""
    library = entry[0] if isinstance(entry, list) and entry else None
    if library in STEMS:
        return str(library)
    return "diffusers" if any(file.name.startswith(STEMS["diffusers"]) for file in files) else "transformers"


def _link_weights(chosen: WeightFiles, library: str, folder: Path) -> None:
    """The weights under the names that the library looks for first."""
    stem = STEMS[library]
    if chosen.index is None:
        (folder / f"{stem}.safetensors").symlink_to(chosen.files[0].absolute())
        return
    (folder / f"{stem}.safetensors.index.json").symlink_to(chosen.index.absolute())
    for file in chosen.files:
        (folder / file.name).symlink_to(file.absolute())
