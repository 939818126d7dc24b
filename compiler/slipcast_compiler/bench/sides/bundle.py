"""A bundle in the runtime, as a host runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_about: dict[str, Any] = {}


def open_side(job: dict[str, Any]) -> Any:
    """job: bundle, target, steps (None for the bundle's own); pictures: of a captured program, files by argument."""
    import slipcast

    pipe: Any = slipcast.load(job["bundle"], target=job["target"])
    program = getattr(pipe, "program", None)  # of a captured pipeline
    steps = job["steps"] or (program.usual_steps if program else pipe.manifest.sampling.steps)
    # What is measured is the specialised denoiser, also where the guard takes a prompt for a stranger.
    given = {"guard": "warn", **(_read(job["pictures"]) if program else {})}
    _about.update(target=pipe.target, slipcast=slipcast.__version__, steps=steps)
    if pipe.target.startswith("openvino") and not pipe.target.endswith("fp32"):
        from slipcast.engines.openvino import bf16_is_native

        _about["bf16_is_native"] = bf16_is_native()

    def draw(prompts: list[str | None], seeds: list[int]) -> tuple[Any, dict[str, float]]:
        texts = [prompt for prompt in prompts if prompt is not None]
        output = pipe(
            texts or None, seed=seeds, num_images_per_prompt=1 if texts else len(seeds),
            num_inference_steps=job["steps"], output_type="np", **given,
        )  # fmt: skip
        return output.images, {name: s for name, s in output.seconds.items() if name != "total"}

    return draw


def _read(pictures: dict[str, Any]) -> dict[str, Any]:
    from slipcast.run.pictures import open_given

    def read(file: Any) -> Any:
        return [read(each) for each in file] if isinstance(file, list) else open_given(Path(file))

    return {name: read(file) for name, file in pictures.items()}


def describe() -> dict[str, Any]:
    """The target that was chosen."""
    return _about
