"""What commands share: options, printing a result, and refusing early what could not be written after the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
unlisted_option: Callable[[Any], Any] = click.option(
    "--allow-unlisted", is_flag=True, help="Tolerate files that the manifest does not list."
)
target_option: Callable[[Any], Any] = click.option(
    "--target", default="auto", show_default=True, help="An engine or target id of the bundle."
)
bundle_argument: Callable[[Any], Any] = click.argument("bundle", type=click.Path(path_type=Path))


def emit(document: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else text)


def is_directory(output: Path) -> bool:
    """Whether an output is to be a directory: it is one, or has no suffix."""
    return output.is_dir() or not output.suffix


def check_writable(output: Path) -> None:
    """UsageError where nothing can be written there."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if (nearest.is_file() and nearest != output) or not os.access(nearest, os.W_OK):
        raise click.UsageError(f"cannot write {output}: {nearest} cannot be written to")
