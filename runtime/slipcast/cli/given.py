"""What a run of a captured program is given besides a prompt: pictures, arrays, and other texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from slipcast.bundle.program import Program

image_option: Callable[[Any], Any] = click.option(
    "--image",
    "images",
    multiple=True,
    metavar="[ARGUMENT=]FILE",
    help="A picture that the bundle takes, or an array (.npy); of a list, in its order.",
)
text_option: Callable[[Any], Any] = click.option(
    "--text", "texts", multiple=True, metavar="ARGUMENT=TEXT", help="Another text that the bundle takes."
)


def read_given(program: Program | None, images: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """The arguments that only programs have: pictures, and texts by the names that they give them."""
    from slipcast.run.pictures import open_given

    found: dict[str, Any] = {}
    for given in texts:
        name, equals, text = given.partition("=")
        if not program or name not in program.arguments or not equals:
            raise click.UsageError(f"--text {given}: {_names('ARGUMENT=TEXT', program.arguments if program else ())}")
        found[name] = text
    taken, files = program.images if program else {}, dict[str, list[Path]]()
    for given in images:
        name, file = _of_argument(taken, given)
        files.setdefault(name, []).append(file)
    for name, several in files.items():
        read = [open_given(file) for file in several]
        is_list = len(read) > 1 or taken[name][0].place is not None
        found[name] = read if is_list else read[0]
    return found


def _of_argument(taken: Collection[str], given: str) -> tuple[str, Path]:
    """The argument that a picture is for, and its file: the one that is named, else "image", or the only one."""
    name, equals, file = given.partition("=")
    if equals and name in taken:
        return name, Path(file)
    usual = "image" if "image" in taken or len(taken) != 1 else next(iter(taken))
    if usual not in taken or (equals and not Path(given).exists()):  # a path may hold an equals sign
        raise click.UsageError(f"--image {given}: {_names('ARGUMENT=FILE', taken)}")
    return usual, Path(given)


def _names(form: str, names: Collection[str]) -> str:
    return f"give {form}, of {', '.join(names)}" if names else "this bundle takes none"
