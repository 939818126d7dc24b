"""`slipcast capture`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slipcast.cli.common import emit, json_option
from slipcast.errors import CheckFailed


@click.command("capture")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--pipeline", metavar="CLASS", help="A class of diffusers, or package.module:Class.  [default: the model's]"
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="An argument of the pipeline's call.")
@click.option("--verify", "check", is_flag=True, help="Load the weights, and compare on another prompt and seed.")
@json_option
def capture_command(model: Path, pipeline: str | None, overrides: tuple[str, ...], check: bool, as_json: bool) -> None:
    """Show what a diffusers pipeline does: its own code, run once without weights and recorded.

    Sources, components, the sampling loop's form and guidance, what the program cannot follow; the parts that a bundle
    of it has, and what a run of one may choose.
    """
    from slipcast_compiler.capture.run import capture_model, render_all

    if pipeline and ":" in pipeline:
        sys.path.append(str(Path.cwd()))  # the user's own module may lie here; nothing that is installed gives way
    summary = capture_model(model, pipeline, overrides, check)
    emit(summary, render_all(summary), as_json)
    if check and not summary["verified"]["holds"]:
        sys.exit(CheckFailed.exit_code)
