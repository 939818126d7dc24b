"""`slipcast run`: a prompt to pictures on disk."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slipcast.cli.common import (
    bundle_argument,
    check_writable,
    emit,
    is_directory,
    json_option,
    target_option,
    unlisted_option,
    write_whole,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from slipcast.run.pipeline import Pipeline


@click.command()
@bundle_argument
@click.option("--prompt", help="What to draw; not for unconditional bundles.")
@click.option("--negative-prompt", default="", help="What to stay away from.")
@click.option("--seed", type=int, help="Image i gets seed + i.  [default: random, and said]")
@click.option("--num-images", type=int, default=1, show_default=True, help="More than one make a grid.")
@click.option("--steps", type=int, help="Sampling steps.  [default: the bundle's]")
@click.option("--guidance-scale", type=float, help="[default: the bundle's]")
@target_option
@click.option("--residency", type=click.Choice(["all", "sequential"]), default="all", show_default=True)
@unlisted_option
@click.option("--on-long-prompt", type=click.Choice(["warn", "error"]), default="warn", show_default=True)
@click.option(
    "--guard",
    type=click.Choice(["warn", "refuse", "fallback"]),
    help="What becomes of a prompt out of the family.  [default: what the bundle says]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A picture, or a directory for one each.")
@json_option
def run(
    bundle: Path,
    prompt: str | None,
    negative_prompt: str,
    seed: int | None,
    num_images: int,
    steps: int | None,
    guidance_scale: float | None,
    target: str,
    residency: Any,
    allow_unlisted: bool,
    on_long_prompt: Any,
    guard: Any,
    output: Path | None,
    as_json: bool,
) -> None:
    """Make images."""
    from slipcast.bundle.reader import open_bundle
    from slipcast.progress import Stages
    from slipcast.run.pipeline import load

    if output:
        _check_output(output)
    if prompt is None and open_bundle(bundle, allow_unlisted=allow_unlisted).manifest.takes_prompt:
        raise click.UsageError("--prompt is missing: this bundle draws what a text says")
    stages = Stages()
    with stages.stage("load"):
        pipe = load(bundle, target=target, residency=residency, allow_unlisted=allow_unlisted)
    _check_space(pipe, num_images, output)
    usual = steps or pipe.manifest.sampling.steps  # the unspecialised denoiser may take more
    with pipe, stages.stage(f"sample on {pipe.target}") as advance:
        result = pipe(
            prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            num_images_per_prompt=num_images,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            on_long_prompt=on_long_prompt,
            guard=guard,
            callback_on_step_end=lambda _, step, __, ___: advance(step + 1, max(usual, step + 1)),
        )
    files = _save(result.images, result.seeds, output or Path(f"{pipe.manifest.name}-{result.seeds[0]}.png"))
    document = {
        "files": [str(file) for file in files],
        "seeds": list(result.seeds),
        "target": result.target,
        "seconds": {name: round(s, 4) for name, s in result.seconds.items()},
        "steps": list(result.steps),
        "guard": [vars(verdict) for verdict in result.guard],
    }
    emit(document, "\n".join(map(str, files)), as_json)


def _check_output(output: Path) -> None:
    """Refuse before the work what could not be saved after it; what goes wrong nevertheless is met in _save."""
    from PIL import Image

    kinds = Image.registered_extensions()
    if not is_directory(output) and kinds.get(output.suffix.lower()) not in Image.SAVE:
        raise click.UsageError(f"cannot write {output}: no picture format is called {output.suffix}; use .png")
    check_writable(output)


def _check_space(pipe: Pipeline, images: int, output: Path | None) -> None:
    """ResourceError where the pictures might not fit on the disk: compressed or not, they are no larger than this."""
    from slipcast.engines.resources import check_space

    image = pipe.manifest.image
    count = images if isinstance(images, int) else 1
    check_space(output or Path(), max(count, 1) * (image.width * image.height * 4 + 65_536), "the pictures")


def _save(images: Sequence[Image], seeds: Sequence[int], output: Path) -> list[Path]:
    """One file, a grid of all images; or one each, named by seed, where `output` is a directory."""
    from PIL.Image import registered_extensions

    as_directory = is_directory(output)
    files = [output / f"{seed}.png" for seed in seeds] if as_directory else [output]
    pictures = images if as_directory else [make_grid(images)]
    for file, picture in zip(files, pictures, strict=True):
        data = io.BytesIO()
        try:
            picture.save(data, registered_extensions()[file.suffix.lower()])
        except (OSError, ValueError) as error:  # a format that has no such pictures
            raise click.UsageError(f"cannot write {file}: {error}") from None
        write_whole(file, data.getvalue())
    return files


def make_grid(images: Sequence[Image], gap: int = 2) -> Image:
    """Pictures of one size, row by row, in as square a grid as their number allows; a single one stays as it is."""
    from PIL import Image

    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid
