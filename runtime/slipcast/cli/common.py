"""What commands share: options, and printing a result."""

from __future__ import annotations

import json
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
residency_option: Callable[[Any], Any] = click.option(
    "--residency",
    metavar="[all|sequential|SIZE]",
    default="all",
    show_default=True,
    help="Engines that stay in memory: all, those in use, or, such as 4GB, what fits.",
)
bundle_argument: Callable[[Any], Any] = click.argument("bundle", type=click.Path(path_type=Path))


def emit(document: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result on stdout, where a bundle's words steer nothing."""
    from slipcast.bundle.validation import shown, shown_json

    click.echo(shown_json(json.dumps(document, indent=2, ensure_ascii=False)) if as_json else shown(text))
