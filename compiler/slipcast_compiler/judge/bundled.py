"""Run a bundle through the runtime, as a host would; imports nothing that the runtime does not."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from slipcast.bundle.program import IMAGES
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.engines import ENGINES
from slipcast.errors import CheckFailed
from slipcast.progress import Advance
from slipcast.run.residency import Policy
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
    with _loaded(root, target) as (pipe, load_s):
        guard = pipe.manifest.guard
        of_family = {"guard": "warn"} if guard else {}
        of_strangers = {"guard": "fallback"} if guard and guard.policy == "fallback" else of_family
        arguments = [of_family if i < held_out else of_strangers for i in range(len(prompts))]
        outputs = list(_draw(pipe, Job(prompts, seeds, {}), advance, arguments))
    return _told(pipe, outputs, outputs[:held_out], load_s)


TOGETHER = 0.05  # how far images of one call may be from each by itself: rounding by other kernels is less


@dataclass(frozen=True)
class Job:
    """What a bundle is to draw: an image for each prompt and seed. `given`: arguments of every call. `strangers`:
    prompts are out of the family, and those that the guard takes for such are drawn by what is there for them."""

    prompts: Sequence[str | None]
    seeds: Sequence[int]
    given: Mapping[str, Any]
    strangers: bool = False


def run_program(
    root: Path, target: str, policy: Policy, jobs: Sequence[Job], advance: Advance
) -> list[dict[str, Any]]:  # fmt: skip
    """The same of a captured program, for each job; in its results' own shapes. `policy`: how engines stay loaded."""
    made, done, total = [], 0, sum(len(job.seeds) for job in jobs)
    with _loaded(root, target, policy) as (pipe, load_s):
        guard = pipe.manifest.guard
        lenient = {"guard": "warn"} if guard else {}  # what is judged is drawn in any case
        apart = {"guard": "fallback"} if guard and guard.policy == "fallback" else lenient
        for job in jobs:
            drawn = replace(job, given={**job.given, **(apart if job.strangers else lenient)})
            outputs = list(_draw(pipe, drawn, lambda i, _, done=done: advance(done + i, total)))  # type: ignore[misc]
            check_together(pipe, drawn, outputs)
            made.append(_told(pipe, outputs, outputs, load_s))
            done += len(job.seeds)
            pipe.residency.free_others("")  # what the next one has in common is opened again
    return made


def check_together(pipe: Any, job: Job, alone: Sequence[Any]) -> None:
    """CheckFailed where the first two images of a job, drawn in one call, are not what each is by itself, but for
    rounding. Of bundles that take several in a call."""
    manifest = pipe.manifest
    if not isinstance(manifest, ProgramManifest) or IMAGES not in manifest.program.sizes or len(alone) < 2:
        return
    texts = {} if job.prompts[0] is None else {"prompt": list(job.prompts[:2])}
    count = {} if texts else {"num_images_per_prompt": 2}
    both = pipe(**texts, **count, seed=list(job.seeds[:2]), output_type="np", **job.given)
    found, wanted = np.asarray(both.images), np.concatenate([np.asarray(each.images) for each in alone[:2]])
    error = float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-9))
    if not error <= TOGETHER:
        raise CheckFailed(
            "two images of one call are not what each is by itself",
            expected=f"a relative error of {TOGETHER}",
            got=f"{error:.2g}",
            hint="this is a defect of slipcast: please report it, with the pipeline's class",
        )


@contextmanager
def _loaded(root: Path, target: str, policy: Policy = "all") -> Iterator[tuple[Any, float]]:
    """The bundle, and the seconds that it took."""
    begin = time.perf_counter()
    from slipcast.run.load import load

    with load(root, target=target, residency=policy) as pipe:
        yield pipe, time.perf_counter() - begin


def _draw(pipe: Any, job: Job, advance: Advance, arguments: Sequence[Mapping[str, Any]] = ()) -> Iterator[Any]:
    """What the pipeline returns of each image; the first is drawn once before, as warm-up. `arguments`: of each image
    besides."""
    own = arguments or [{}] * len(job.seeds)
    pipe(job.prompts[0], seed=job.seeds[0], output_type="np", **job.given, **own[0])
    for i, (prompt, seed, more) in enumerate(zip(job.prompts, job.seeds, own, strict=True)):
        advance(i, len(job.seeds))
        yield pipe(prompt, seed=seed, output_type="np", **job.given, **more)


def _told(pipe: Any, outputs: Sequence[Any], timed: Sequence[Any], load_s: float) -> dict[str, Any]:
    seconds = [output.seconds for output in timed]
    used = [name for name in pipe.manifest.components if name in seconds[0]]
    return {
        "images": np.stack([output.images[0] for output in outputs]),
        "seconds": [each["total"] for each in seconds],
        "load_s": load_s,
        "components_s": {name: statistics.median(each[name] for each in seconds) for name in used},
        "distances": [verdict.distance for output in outputs for verdict in output.guard],
    }


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
