"""Run a bundle through the runtime, as a host would; imports nothing that the runtime does not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.progress import Advance


def make_images(
    root: Path, target: str, prompts: Sequence[str | None], seeds: Sequence[int], advance: Advance
) -> dict[str, Any]:
    """One image per prompt and seed, one at a time.

    Returns images (float32 [n, h, w, 3] in [0, 1]), seconds of each, load_s, and seconds per image by component.
    """
    begin = time.perf_counter()
    import slipcast

    with slipcast.load(root, target=target) as pipe:
        load_s = time.perf_counter() - begin
        pictures, seconds, components = [], [], dict.fromkeys(pipe.manifest.components, 0.0)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            advance(i, len(prompts))
            output = pipe(prompt, seed=seed, output_type="np", on_long_prompt="warn")
            seconds.append(output.seconds["total"])
            for name in components:
                components[name] += output.seconds[name] / len(prompts)
            pictures.append(output.images[0])
    return {"images": np.stack(pictures), "seconds": seconds, "load_s": load_s, "components_s": components}
