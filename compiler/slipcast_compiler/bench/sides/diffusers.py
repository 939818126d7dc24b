"""The checkpoint in diffusers, eager or with its denoiser compiled by torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_about: dict[str, Any] = {}


def open_side(job: dict[str, Any]) -> Any:
    """job: model, sampling, size (width, height), dtype, threads, compile, device."""
    from slipcast.bundle.manifest import Sampling
    from slipcast_compiler.host.quiet import quiet
    from slipcast_compiler.model import original

    with quiet():
        import diffusers
        import torch

        torch.set_num_threads(job["threads"])
        sampling = Sampling.model_validate_json(json.dumps(job["sampling"]))
        pipe = original.open_pipeline(Path(job["model"]), sampling, job["dtype"]).to(job.get("device", "cpu"))
    _about.update(torch=torch.__version__, diffusers=diffusers.__version__, dtype=job["dtype"], steps=sampling.steps)
    if job.get("compile"):
        # A graph for each batch size is faster than one for all; the warm-up of each size pays for it.
        pipe.unet.compile(dynamic=False)
        read: Callable[[], dict[str, float] | None] = lambda: None  # noqa: E731 - clocks would cut the compiled graph
    else:
        read = _clocks(pipe)

    def draw(prompts: list[str | None], seeds: list[int]) -> tuple[Any, dict[str, float] | None]:
        read()
        return original.draw(pipe, sampling, job["size"], prompts, seeds), read()

    return draw


def describe() -> dict[str, Any]:
    """Versions and dtype."""
    return _about


def _clocks(pipe: Any) -> Callable[[], dict[str, float] | None]:
    """Time each component; the function returns the seconds since it was last called."""
    seconds: dict[str, float] = {}
    begun: dict[str, float] = {}

    def watch(name: str, module: Any) -> None:
        def before(*_: Any) -> None:
            begun[name] = time.perf_counter()

        def after(*_: Any) -> None:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun[name]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    watch("denoiser", pipe.unet)
    if hasattr(pipe, "text_encoder"):
        watch("text_encoder", pipe.text_encoder)
    if hasattr(pipe, "vae"):
        watch("vae_decoder", pipe.vae.decoder)

    def read() -> dict[str, float]:
        found = dict(seconds)
        seconds.clear()
        return found

    return read
