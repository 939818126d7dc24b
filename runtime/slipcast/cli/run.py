"""`slipcast run`: a prompt to pictures, videos or sounds on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slipcast.cli.common import bundle_argument, emit, json_option, residency_option, target_option, unlisted_option
from slipcast.cli.given import image_option, read_given, text_option

if TYPE_CHECKING:
    from slipcast.bundle.program import Variant
    from slipcast.bundle.program_manifest import ProgramManifest
    from slipcast.progress import Advance
    from slipcast.run.base import PipelineOutput
    from slipcast.run.pipeline import Pipeline
    from slipcast.run.program import ProgramPipeline


@click.command()
@bundle_argument
@click.option("--prompt", help="What to draw; not for unconditional bundles.")
@click.option("--negative-prompt", help="What to stay away from.")
@image_option
@text_option
@click.option("--seed", type=int, help="Image i gets seed + i.  [default: random, and said]")
@click.option("--num-images", type=int, default=1, show_default=True, help="More than one make a grid.")
@click.option("--steps", type=int, help="Sampling steps.  [default: the bundle's]")
@click.option("--guidance-scale", type=float, help="[default: the bundle's]")
@click.option("--height", type=int, help="Pixels.  [default: the bundle's]")
@click.option("--width", type=int, help="Pixels.  [default: the bundle's]")
@click.option(
    "--adapter",
    "adapters",
    metavar="FILE[:SCALE]",
    multiple=True,
    help="A LoRA, for bundles with slots; may be repeated.",
)
@target_option
@residency_option
@unlisted_option
@click.option("--on-long-prompt", type=click.Choice(["warn", "error"]), default="warn", show_default=True)
@click.option(
    "--guard",
    type=click.Choice(["warn", "refuse", "fallback"]),
    help="What becomes of a prompt out of the family.  [default: what the bundle says]",
)
@click.option("--fps", type=float, help="Frames per second of a video.  [default: the pipeline's, or else 10]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A picture; a video as .png, .webp, .gif or .mp4; a sound as .wav; a directory for a file each.",
)
@json_option
def run(
    bundle: Path,
    images: tuple[str, ...],
    texts: tuple[str, ...],
    num_images: int,
    steps: int | None,
    adapters: tuple[str, ...],
    target: str,
    residency: Any,
    allow_unlisted: bool,
    fps: float | None,
    output: Path | None,
    as_json: bool,
    **request: Any,
) -> None:
    """Make images, videos or sounds: what the bundle gives."""
    from slipcast.bundle.reader import ProgramBundle, open_any_bundle
    from slipcast.progress import Stages
    from slipcast.run.load import load
    from slipcast.run.program import ProgramPipeline
    from slipcast.run.saving import check_output, save, usual_path

    opened = open_any_bundle(bundle, allow_unlisted=allow_unlisted)
    program = opened.manifest.program if isinstance(opened, ProgramBundle) else None
    check_output(output or Path(), program.output if program else "image", fps)
    if request["prompt"] is None and opened.manifest.takes_prompt:
        raise click.UsageError("--prompt is missing: this bundle draws what a text says")
    request |= {"num_images_per_prompt": num_images, "num_inference_steps": steps}
    request |= read_given(program, images, texts)
    stages = Stages()
    with stages.stage("load"):
        pipe = load(bundle, target=target, residency=residency, allow_unlisted=allow_unlisted)
    _set_adapters(pipe, adapters)
    _check_space(pipe, num_images, output)
    with pipe, stages.stage(f"sample on {pipe.target}") as advance:
        if isinstance(pipe, ProgramPipeline):
            result = _run_program(pipe, request, advance)
        else:
            result = _sample(pipe, request, advance)
    files = save(result, output or usual_path(pipe.manifest.name, result), fps=fps)
    document = {
        "files": [str(file) for file in files],
        "seeds": list(result.seeds),
        "target": result.target,
        "seconds": {name: round(s, 4) for name, s in result.seconds.items()},
        "steps": list(result.steps),
        "guard": [vars(verdict) for verdict in result.guard],
    }
    emit(document, "\n".join(map(str, files)), as_json)


def _set_adapters(pipe: Pipeline | ProgramPipeline, given: tuple[str, ...]) -> None:
    """FILE:SCALE, with a scale of 1 where there is none."""
    from slipcast.errors import RequestError
    from slipcast.run.program import ProgramPipeline

    if not given:
        return
    if not isinstance(pipe, ProgramPipeline):
        raise RequestError("this bundle has no slots for adapters", expected="one of a captured pipeline")
    scales = {}
    for at, text in enumerate(given):
        file, _, number = text.rpartition(":")
        try:
            scale = float(number) if file else 1.0
        except ValueError:  # a colon of the path
            file, scale = text, 1.0
        pipe.load_adapter(f"{at}: {file or text}", file or text)
        scales[f"{at}: {file or text}"] = scale
    pipe.set_adapters(scales)


def _sample(pipe: Pipeline, request: dict[str, Any], advance: Advance) -> PipelineOutput:
    # The unspecialised denoiser may take more steps.
    usual = request["num_inference_steps"] or pipe.manifest.sampling.steps
    return pipe(**request, callback_on_step_end=lambda _, step, __, ___: advance(step + 1, max(usual, step + 1)))


def _run_program(pipe: ProgramPipeline, request: dict[str, Any], advance: Advance) -> PipelineOutput:
    return pipe(**request, callback_on_step_end=lambda _, step, steps: advance(step + 1, steps))


def _check_space(pipe: Pipeline | ProgramPipeline, images: int, output: Path | None) -> None:
    """ResourceError where the results might not fit on the disk: compressed or not, they are no larger than this."""
    from slipcast.engines.resources import check_space
    from slipcast.run.program import ProgramPipeline

    if isinstance(pipe, ProgramPipeline):
        size = max(_program_size(pipe.manifest, variant) for variant in pipe.program.every)
    else:
        size = pipe.manifest.image.width * pipe.manifest.image.height * 4
    count = images if isinstance(images, int) else 1
    check_space(output or Path(), max(count, 1) * (size + 65_536), "the pictures")


def _program_size(manifest: ProgramManifest, variant: Variant) -> int:
    """Bytes of the results, as far as their shapes are known."""
    specs = manifest.specs(variant)
    shapes = [specs[value].shape for value in variant.results if value in specs]
    return sum(4 * math.prod(each for each in shape if isinstance(each, int)) for shape in shapes)
