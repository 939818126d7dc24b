"""`slipcast profile-run`: where a run spends its time and memory, on the terminal and as a page."""

from __future__ import annotations

from pathlib import Path

import click

from slipcast.cli.common import bundle_argument, emit, json_option, target_option, unlisted_option
from slipcast.cli.given import image_option, read_given, text_option


@click.command("profile-run")
@bundle_argument
@click.option("--prompt", help="What to draw.  [default: a held-out prompt of the bundle's report]")
@image_option
@text_option
@click.option("--seed", type=int, default=0, show_default=True, help="Image i gets seed + i.")
@click.option("--num-images", type=int, default=1, show_default=True)
@click.option("--steps", type=int, help="Sampling steps.  [default: the bundle's]")
@target_option
@unlisted_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Page to write.  [default: NAME-profile.html]")
@json_option
def profile_run(
    bundle: Path,
    prompt: str | None,
    images: tuple[str, ...],
    texts: tuple[str, ...],
    seed: int,
    num_images: int,
    steps: int | None,
    target: str,
    allow_unlisted: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Show where a run spends its time and memory."""
    from slipcast.bundle.reader import ProgramBundle, open_any_bundle
    from slipcast.progress import Stages
    from slipcast.run.writing import check_writable, is_directory, write_whole
    from slipcast.timing.measure import profile_run
    from slipcast.timing.page import render_page
    from slipcast.timing.table import render_table

    if output:
        if is_directory(output):
            raise click.UsageError(f"cannot write {output}: name a page, such as {output / 'profile.html'}")
        check_writable(output)
    opened = open_any_bundle(bundle, allow_unlisted=allow_unlisted)
    given = read_given(opened.manifest.program if isinstance(opened, ProgramBundle) else None, images, texts)
    document = profile_run(bundle, prompt, target, steps, num_images, seed, allow_unlisted, Stages(), given)
    output = output or Path(f"{document['name']}-profile.html")
    write_whole(output, render_page(document).encode())
    emit(document | {"files": [str(output)]}, f"{render_table(document)}\npicture: {output}", as_json)
