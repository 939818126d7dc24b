"""`slipcast init`."""

from __future__ import annotations

from pathlib import Path

import click

from slipcast.cli.common import emit, json_option


@click.command("init")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompts", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Recipe to write.  [default: NAME.toml]")
@json_option
def init_command(model: Path, prompts: Path | None, output: Path | None, as_json: bool) -> None:
    """Write a commented recipe for a model directory and, unless it is unconditional, a file with one prompt a line."""
    from slipcast_compiler.init import write_recipe

    written = write_recipe(model, prompts, output)
    emit({"recipe": str(written)}, f"{written} written; next: slipcast compile {written} --dry-run", as_json)
