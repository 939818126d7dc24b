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
    """Print a command's result on stdout, where a bundle's words steer nothing."""
    from slipcast.bundle.validation import shown, shown_json

    click.echo(shown_json(json.dumps(document, indent=2, ensure_ascii=False)) if as_json else shown(text))


def write_whole(output: Path, data: bytes) -> None:
    """A file, complete or not at all. UsageError where it cannot be written, ResourceError where the disk is full."""
    from slipcast.engines.resources import as_resource_error, check_space, disk_full

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
        raise click.UsageError(f"cannot write {output}: {error}") from None
    finally:
        if apart:
            part.unlink(missing_ok=True)


def is_directory(output: Path) -> bool:
    """Whether an output is to be a directory: it is one, or has no suffix."""
    return output.is_dir() or not output.suffix


def check_writable(output: Path) -> None:
    """UsageError where nothing can be written there."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if (nearest.is_file() and nearest != output) or not os.access(nearest, os.W_OK):
        raise click.UsageError(f"cannot write {output}: {nearest} cannot be written to")
