"""A bundle in the runtime, as a host runs it."""

from __future__ import annotations

from typing import Any

_about: dict[str, Any] = {}


def open_side(job: dict[str, Any]) -> Any:
    """job: bundle, target, steps (None for the bundle's own)."""
    import slipcast

    pipe: Any = slipcast.load(job["bundle"], target=job["target"])
    steps = job["steps"] or pipe.manifest.sampling.steps
    _about.update(target=pipe.target, slipcast=slipcast.__version__, steps=steps)
    if pipe.target.startswith("openvino") and not pipe.target.endswith("fp32"):
        from slipcast.engines.openvino import bf16_is_native

        _about["bf16_is_native"] = bf16_is_native()

    def draw(prompts: list[str | None], seeds: list[int]) -> tuple[Any, dict[str, float]]:
        texts = [prompt for prompt in prompts if prompt is not None]
        # What is measured is the specialised denoiser, also where the guard takes a prompt for a stranger.
        output = pipe(
            texts or None, seed=seeds, num_images_per_prompt=1 if texts else len(seeds),
            num_inference_steps=job["steps"], output_type="np", guard="warn",
        )  # fmt: skip
        return output.images, {name: s for name, s in output.seconds.items() if name != "total"}

    return draw


def describe() -> dict[str, Any]:
    """The target that was chosen."""
    return _about
