"""`slipcast build`."""

from __future__ import annotations

from pathlib import Path

import click

from slipcast.cli.common import bundle_argument, emit, json_option
from slipcast_compiler.cli.options import cache_option


@click.command("build")
@bundle_argument
@click.option("--target", "wanted", required=True, metavar="ENGINE[:PRECISION]", help="Such as tensorrt-rtx:fp16.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of a recipe's target, such as max_images=8."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to make.  [default: BUNDLE itself]")
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Pictures to compare, if it runs.")
@click.option("--replace", is_flag=True, help="Build a target again that the bundle has.")
@cache_option
@json_option
def build_command(
    bundle: Path, wanted: str, overrides: tuple[str, ...], output: Path | None, images: int, replace: bool,
    cache: Path, as_json: bool,
) -> None:  # fmt: skip
    """Add a target to a published bundle, from the ONNX in it: neither torch nor the checkpoint is needed.

    What can run here is compared with the target whose graphs it was built from.
    """
    from slipcast.progress import Stages
    from slipcast_compiler.add_target import add_target
    from slipcast_compiler.host.cache import Cache
    from slipcast_compiler.recipe.reading import parse_target

    table = parse_target(wanted, overrides)
    made = add_target(bundle, table, output or bundle, Cache(cache), Stages(), images, replace)
    found, size = made.target.addition, sum(file.size for file in made.manifest.files) / 1e6
    text = f"{made.output}: {made.target.id} added, {len(made.manifest.files)} files, {size:.1f} MB"
    if found:
        text += (
            f"\n  {found.latency_s:.3f} s per image ({found.against}: {found.latency_against_s:.3f} s), "
            f"PSNR {found.psnr_worst:.1f} dB against it on the worst of {found.images}"
        )
    else:
        text += f"\n  not run here, not compared: {made.not_run}"
    emit({"output": str(made.output), "target": made.target.id, "not_run": made.not_run,
          "addition": found and found.model_dump(mode="json")}, text, as_json)  # fmt: skip
