"""What pipelines have in common: a bundle on one of its targets, engines to open and free, calls that take turns."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from slipcast.bundle.manifest import Target
from slipcast.bundle.program import Output
from slipcast.bundle.reader import BaseBundle, check_digests
from slipcast.engines import Engine, Instrument, open_engine
from slipcast.engines.resources import as_resource_error
from slipcast.engines.targets import choose_target
from slipcast.run.guard import Verdict
from slipcast.run.residency import Residency

logger = logging.getLogger("slipcast")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL images, or float32 [n, height, width, channels] in [0, 1], or latents [n, c, h, w]; of captured
    programs, what `kind` says: see ProgramPipeline. `slipcast.save` writes them.

    `seeds[i]` alone makes image i again. `seconds`: time by component; what is left of `total` is spent outside them.
    `guard[i]`: whether image i's prompt is of the family; empty where the bundle has no guard. `steps[i]`: how many
    image i took, fewer than asked for where it stopped early. `rate`: how many frames, or samples of a sound, a second
    has; None where nobody says. `sounds`: of videos that have them, float32 [channels, samples] of each, at
    `sound_rate` samples a second.
    """

    images: Any
    seeds: tuple[int, ...]
    target: str
    seconds: dict[str, float] = field(default_factory=dict)
    guard: tuple[Verdict, ...] = ()
    steps: tuple[int, ...] = ()
    kind: Output = "image"
    rate: float | None = None
    sounds: tuple[npt.NDArray[np.float32], ...] = ()
    sound_rate: float | None = None


class BasePipeline:
    """A bundle, ready on one target. Close it, or use it in a `with` block, to free its engines.

    `residency.use(component)` is a component's engine for a `with` block.
    """

    residency: Residency

    def __init__(self, bundle: BaseBundle, target: Target, instrument: Instrument) -> None:
        """Opens no engine yet: see `_open_engines`."""
        self.bundle, self.manifest, self.target = bundle, bundle.manifest, target.id
        self._target, self._instrument = target, instrument
        for file in target.files:  # whatever is published at this place from now on, they stay
            bundle.file(file)
        self._one_call_at_a_time = threading.RLock()  # of one thread, so that a callback may make pictures too
        self._calls, self._closing = 0, False

    def close(self) -> None:
        """Free the engines. A later call opens each for as long as it is needed.

        From a callback: once the call that it belongs to has ended, which is in need of them until then.
        """
        with self._one_call_at_a_time:
            self._closing = bool(self._calls)
            if not self._calls:
                self.residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open_engines(self, policy: str, rare: Collection[str] = ()) -> None:
        """As Residency does; to be called when all else is ready, for it takes long."""
        openers = {name: partial(self._open, name) for name in self._target.components}
        listed = {entry.path: entry.size for entry in self.manifest.files}
        sizes = {
            name: sum(listed[file] for file in (files.model, files.weights) if file)
            for name, files in self._target.components.items()
        }
        self.residency = Residency(openers, policy, rare, sizes)

    def _open(self, component: str, precision: str | None = None, target: Target | None = None) -> Engine:
        target = target or self._target
        files = target.components[component]
        weights = self.bundle.file(files.weights) if files.weights else None
        model = self.bundle.file(files.model)
        contract = self.manifest.components[component]
        opener = partial(open_engine, target.engine, model, weights, precision or target.precision, contract)
        return self._instrument(component, opener)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The block of a call, while no other thread's call is running; ResourceError where memory or disk runs out."""
        with self._one_call_at_a_time:
            self._calls += 1
            try:
                yield
            except Exception as error:
                if lack := as_resource_error(error, "making images"):
                    raise lack from error
                raise
            finally:
                self._calls -= 1
                if self._closing and not self._calls:
                    self.close()


def ready_target(bundle: BaseBundle, wanted: str) -> Target:
    """The target to run, when what will be read for it is verified; see load."""
    chosen = choose_target(bundle.manifest, wanted)
    logger.info("target %s%s", chosen.id, " (the bundle's first that runs here)" if wanted == "auto" else "")
    if bundle.manifest.unjudged:
        logger.warning("%s is unjudged: nothing of it was compared with the original's pictures", bundle.manifest.name)
    check_digests(bundle, [*bundle.manifest.shared_files, *chosen.files])
    return chosen


def to_pil(picture: Floats) -> Image.Image:
    """float32 [h, w, 1, 3 or 4] in [0, 1] to a picture, rounded as diffusers does."""
    levels = (picture * 255).round().astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
