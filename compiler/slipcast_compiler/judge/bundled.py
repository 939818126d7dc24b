"""Run a bundle through the runtime, as a host would; imports nothing that the runtime does not."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from slipcast.engines import ENGINES
from slipcast.progress import Advance
from slipcast.timing.memory import resident_mb


def make_images(
    root: Path, target: str, prompts: Sequence[str | None], seeds: Sequence[int], held_out: int, advance: Advance
) -> dict[str, Any]:
    """One image per prompt and seed, one at a time; the first is drawn once before, as warm-up.

    The first `held_out` are drawn by the bundle's specialised denoiser whatever its guard says; of the others, those
    that it takes for strangers are drawn by what is there for them.

    Returns images (float32 [n, h, w, 3] in [0, 1]), seconds of each of the held-out, load_s, median seconds by
    component, and the guard's distances.
    """
    return _draw(root, target, prompts, seeds, held_out, {}, advance)


def run_program(
    root: Path, target: str, prompts: Sequence[str | None], seeds: Sequence[int], given: Mapping[str, Any],
    advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    """The same of a captured program, in its results' own shapes; `given`: what it takes besides, such as pictures."""
    return _draw(root, target, prompts, seeds, len(prompts), given, advance)


def _draw(
    root: Path, target: str, prompts: Sequence[str | None], seeds: Sequence[int], held_out: int,
    given: Mapping[str, Any], advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    begin = time.perf_counter()
    from slipcast.run.load import load

    with load(root, target=target) as pipe:
        load_s = time.perf_counter() - begin
        pictures, seconds, distances = [], [], []
        guard = getattr(pipe.manifest, "guard", None)  # which a captured program has not
        of_family = {**given, **({"guard": "warn"} if guard else {})}
        of_strangers = {**given, "guard": "fallback"} if guard and guard.policy == "fallback" else of_family
        pipe(prompts[0], seed=seeds[0], output_type="np", **of_family)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            advance(i, len(prompts))
            output = pipe(prompt, seed=seed, output_type="np", **(of_family if i < held_out else of_strangers))
            seconds += [output.seconds] if i < held_out else []
            distances += [verdict.distance for verdict in output.guard]
            pictures.append(output.images[0])
        used = [name for name in pipe.manifest.components if name in seconds[0]]
        components = {name: statistics.median(each[name] for each in seconds) for name in used}
    return {
        "images": np.stack(pictures), "seconds": [each["total"] for each in seconds], "load_s": load_s,
        "components_s": components, "distances": distances,
    }  # fmt: skip


def measure_memory(root: Path, target: str, component: str, advance: Advance) -> float:
    """Megabytes that a component adds to a process when it is opened and run once."""
    from slipcast.run.pipeline import load

    with load(root, target=target, residency="sequential") as pipe:
        engine_name = next(t.engine for t in pipe.manifest.targets if t.id == target)
        importlib.import_module(ENGINES[engine_name].module)  # the library is there whatever the component
        image, contract = pipe.manifest.image, pipe.manifest.components[cast(Any, component)]
        # As the pipeline calls them, for which alone some engines are built: pictures are decoded one by one.
        height, width = (min(image.tile, size // image.factor) for size in (image.height, image.width))
        free = {"batch": 1 if component == "vae_decoder" else 2, "tile_height": height, "tile_width": width}
        shapes = [[free.get(d, 1) if isinstance(d, str) else d for d in spec.shape] for spec in contract.inputs]
        before = resident_mb()
        with pipe.residency.use(component) as engine:
            engine(
                {spec.name: np.zeros(shape, spec.dtype) for spec, shape in zip(contract.inputs, shapes, strict=True)}
            )
            after = resident_mb()
    return round(after - before, 1)
