"""Does a prompt family decide which attention heads can go, and how many? From a recipe to a report.

    python recipes/study/heads.py recipes/study/heads.toml -o recipes/study

writes NAME.json, NAME.md and NAME-PLOT.svg. Everything that is measured is cached: a study that was killed goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from heads import run
from heads.cases import make_study
from heads.recipe import read_study

from slipcast.errors import SlipcastError
from slipcast.progress import Stages
from slipcast_compiler.host.cache import Cache


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: artifacts/study, or the JSON's]")
@click.option("--dry-run", is_flag=True, help="Say what would be compared and about how long it takes, and stop.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("artifacts/cache"), show_default=True)
def main(recipe: Path, output: Path | None, dry_run: bool, cache: Path) -> None:
    """Compare ways to choose attention heads, over prompt families and ratios.

    RECIPE is a study's recipe; or the JSON of a study that was made, whose report is then written again.
    """
    try:
        if recipe.suffix == ".json":
            document, output = run.read(recipe), output or recipe.parent
        else:
            output = output or Path("artifacts/study")
            study = make_study(read_study(recipe), recipe.parent)
            if dry_run:
                click.echo(run.in_words(run.estimate(study)))
                return
            document = run.run_study(study, recipe, output, Cache(cache), Stages())
        for file in run.write(document, output):
            click.echo(file)
    except SlipcastError as error:
        click.echo(error, err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
