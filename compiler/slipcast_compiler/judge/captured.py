"""A captured pipeline itself, as diffusers runs it: what its bundle is judged against."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.progress import Advance
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.program import leaves
from slipcast_compiler.host.quiet import quiet


def draw(
    root: Path, pipeline: str | None, given: Mapping[str, Any], prompts: Sequence[str | None], seeds: Sequence[int],
    advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    """In fp32, one result for each prompt and seed; runs in a process of its own.

    Returns images (float32 [n, h, w, 3] in [0, 1]; of a video [n, frames, h, w, 3]; of anything else as it is), seconds
    of each, and load_s.
    """
    begin = time.perf_counter()
    pipe = open_with_weights(root, pipeline)
    load_s, results, seconds = time.perf_counter() - begin, [], []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        advance(i, len(seeds))
        begin = time.perf_counter()
        call = make_call(pipe, given, prompt or "", seed)
        with quiet():
            result = pipe(**call)
        seconds.append(time.perf_counter() - begin)
        tensor = next(found for _, found in leaves(dict(result.items()) if hasattr(result, "items") else result))
        array = tensor.float().numpy()[0]
        pictures = array.ndim in (3, 4) and array.shape[-3] in (1, 3, 4)
        results.append(np.moveaxis(array, -3, -1) if pictures else array)
    return {"images": np.stack(results), "seconds": seconds, "load_s": load_s}
