"""What several commands of the compiler take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

recipe_argument: Callable[[Any], Any] = click.argument("recipe", type=click.Path(path_type=Path))
set_option: Callable[[Any], Any] = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
)
cache_option: Callable[[Any], Any] = click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("artifacts/cache"), show_default=True, help="Build cache."
)
