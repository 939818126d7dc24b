"""A pipeline in diffusers, eager, called as it was captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_about: dict[str, Any] = {}


def open_side(job: dict[str, Any]) -> Any:
    """job: model, pipeline (a class, or None for the model's own), call (arguments; of lists, the first of each), kind
    of the results, steps, dtype, threads."""
    from slipcast_compiler.host.quiet import quiet

    with quiet():
        import diffusers
        import numpy as np
        import torch

        from slipcast.bundle.program import NUMBERS
        from slipcast_compiler.capture.call import make_call
        from slipcast_compiler.capture.fitting import with_pictures
        from slipcast_compiler.capture.listed import combinations
        from slipcast_compiler.capture.open import open_with_weights
        from slipcast_compiler.judge.captured import draw_one

        torch.set_num_threads(job["threads"])
        root = Path(job["model"])
        pipe = open_with_weights(root, job["pipeline"], getattr(torch, job["dtype"]))
        given = with_pictures(pipe, combinations(pipe, job["call"])[0])
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    _about.update(versions, dtype=job["dtype"], steps=job["steps"])

    def draw(prompts: list[str | None], seeds: list[int]) -> tuple[Any, None]:
        results = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            found = draw_one(pipe, make_call(pipe, given, prompt or "", seed), root)
            results.append(found if job["kind"] in NUMBERS else np.moveaxis(found, -3, -1))
        return np.stack(results), None

    return draw


def describe() -> dict[str, Any]:
    """Versions and dtype."""
    return _about
