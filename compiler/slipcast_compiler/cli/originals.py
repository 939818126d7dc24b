"""`slipcast originals`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slipcast.cli.common import emit, json_option
from slipcast_compiler.cli.options import set_option


@click.command("originals")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@set_option
@json_option
def originals_command(recipe: Path, output: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Draw what a bundle of a captured pipeline will be judged by, for a compile on another machine.

    On a GPU where torch has one. There, evaluate.originals names the directory: the checkpoint's files, the prompts and
    the call have to be the same.
    """
    from slipcast.progress import Stages
    from slipcast_compiler.originals import draw_elsewhere
    from slipcast_compiler.recipe.reading import read_recipe

    sys.path.append(str(recipe.parent.resolve()))  # the user's own module may lie beside the recipe
    record = draw_elsewhere(read_recipe(recipe, overrides), recipe.parent, output, Stages())
    text = f"{output}: pictures in {record.precision}, drawn on {record.machine}; for evaluate.originals"
    emit({"output": str(output), **record.model_dump(mode="json")}, text, as_json)
