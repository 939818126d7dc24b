"""Record what a bundle's components read and give while it draws; imports nothing that the runtime does not."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from slipcast.bundle.manifest import FALLBACK, Target
from slipcast.bundle.reader import Bundle, open_any_bundle, open_bundle
from slipcast.engines import Array, Engine, EngineWrapper
from slipcast.engines.onnxruntime import OnnxRuntimeEngine
from slipcast.progress import Advance
from slipcast.run.load import load
from slipcast.run.pipeline import Pipeline

DENOISER: Final = "denoiser"
STEP: Final = "denoiser_step"
Images = Sequence[tuple[str | None, int]]  # prompt and seed of each
Evaluation = dict[str, Array]  # what an engine read and gave, by name


class Recording:
    """An instrument of pipelines that remembers what some components read and gave.

    `calls`: in their order, the component and copies of its arrays by name. Clear it to begin anew.
    """

    def __init__(self, components: Collection[str]) -> None:
        self._components = components
        self.calls: list[tuple[str, Evaluation]] = []

    def __call__(self, component: str, open: Callable[..., Engine]) -> Engine:
        engine = open()
        return _Recorder(component, engine, self.calls) if component in self._components else engine

    def evaluations(self, component: str) -> list[Evaluation]:
        """The calls of one component."""
        return [arrays for name, arrays in self.calls if name == component]


class _Recorder(EngineWrapper):
    """An engine that keeps copies of its arrays."""

    def __init__(self, component: str, engine: Engine, calls: list[tuple[str, Evaluation]]) -> None:
        super().__init__(engine)
        self._component, self._calls = component, calls

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self.engine(arrays)
        self._calls.append((self._component, {name: array.copy() for name, array in {**arrays, **outputs}.items()}))
        return outputs


class Mapped:
    """An instrument of pipelines that opens the files of a portable target of one's own bundle where they lie: models
    that do not fit into memory run, only slower."""

    def __init__(self, root: Path, target: str) -> None:
        self._root, targets = root, open_any_bundle(root).manifest.targets
        self._components = next(each for each in targets if each.id == target).components

    def __call__(self, component: str, open: Callable[..., Engine]) -> Engine:
        return OnnxRuntimeEngine(self._root / self._components[component].model, mapped=True)


def record(
    root: Path,
    target: str,
    components: Collection[str],
    images: Images,
    count: int,
    out: Path,
    advance: Advance,
) -> None:
    """Draw the images, each by its prompt and seed, and write `count` evaluations of each of the components, or all
    where there are fewer, to out/COMPONENT/0000.npz and so on.

    Every image gives about as many, spread over its steps and beginning at another one than the last image's. What is
    in memory is one image's. No component is spared: what is tabled by timestep is computed at each that is tabled, and
    what draws strangers draws everyone, after the others have been recorded.

    Runs in a process of its own, which has to be told everything: hence the seven parameters.
    """
    bundle = open_bundle(root)
    chosen = next(each for each in bundle.manifest.targets if each.id == target)
    if folders := {name: out / name for name in components if name != FALLBACK}:
        _record(bundle, chosen, folders, images, count, advance)
    if FALLBACK in components:
        _record(*_unspecialised(bundle, chosen), {DENOISER: out / FALLBACK}, images, count, advance)


def record_program(
    root: Path,
    target: str,
    components: Collection[str],
    images: Images,
    given: Sequence[Mapping[str, Any]],
    count: int,
    out: Path,
    advance: Advance,
) -> None:
    """As `record`, of a captured program's bundle. `given`: by variant, what each of its calls takes besides, such as
    pictures; images are of the variants in turns.

    Runs in a process of its own too: hence the eight parameters.
    """
    recording, mapped = Recording(components), Mapped(root, target)
    turns = cycle(given)

    def instrument(component: str, open: Callable[..., Engine]) -> Engine:
        return recording(component, lambda: mapped(component, open))

    with load(root, target=target, instrument=instrument) as pipe:
        lenient: dict[str, Any] = {"guard": "warn"} if pipe.manifest.guard else {}

        def draw(prompt: str | None, seed: int) -> None:
            pipe(prompt, seed=seed, output_type="np", **next(turns), **lenient)

        _write(recording, draw, {name: out / name for name in components}, images, count, advance)


def digest_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a call takes besides a text, for the cache's keys: pictures by SHA-256, others as they are."""

    def digest(value: Any) -> Any:
        if isinstance(value, list):
            return [digest(each) for each in value]
        return hashlib.sha256(value.tobytes()).hexdigest() if isinstance(value, np.ndarray) else value

    return {name: digest(value) for name, value in given.items()}


def _record(
    bundle: Bundle,
    target: Target,
    folders: Mapping[str, Path],
    images: Images,
    count: int,
    advance: Advance,
) -> None:
    """As `record`, of the components that have folders."""
    recording = Recording(folders)
    timesteps = bundle.manifest.cut.timesteps if bundle.manifest.cut and STEP in folders else ()
    with Pipeline(bundle, target, instrument=recording) as pipe:

        def draw(prompt: str | None, seed: int) -> None:
            pipe(prompt, seed=seed, output_type="np" if "vae_decoder" in folders else "latent", guard="warn")
            if timesteps:
                with pipe.residency.use(STEP) as engine:
                    for timestep in timesteps:
                        engine({"timestep": np.array([timestep], np.float32)})

        _write(recording, draw, folders, images, count, advance)


def _write(
    recording: Recording,
    draw: Callable[[str | None, int], None],
    folders: Mapping[str, Path],
    images: Images,
    count: int,
    advance: Advance,
) -> None:
    """Draw each image, and write the share of its evaluations; see record."""
    written = Counter[str]()
    for i, (prompt, seed) in enumerate(images):
        advance(i, len(images))
        recording.calls.clear()
        draw(prompt, seed)
        for component, folder in folders.items():
            folder.mkdir(exist_ok=True)
            evaluations = recording.evaluations(component)
            share = min(count * (i + 1) // len(images) - written[component], len(evaluations))
            for k in range(share):
                place = int((k + (i + 0.5) / len(images)) * len(evaluations) / share)
                np.savez(folder / f"{written[component] + k:04}.npz", **cast(Any, evaluations[place]))
            written[component] += share


def _unspecialised(bundle: Bundle, target: Target) -> tuple[Bundle, Target]:
    """What draws strangers, as a bundle of its own and its target, which draw everyone so: latents alone.

    Not the bundle itself with a guard that lets nobody in: that would warn of every prompt.
    """
    manifest = bundle.manifest
    names: dict[str, str] = {text.component: text.component for text in manifest.text}
    names[DENOISER] = FALLBACK
    fields = {
        "components": {name: manifest.components[source] for name, source in names.items()},
        "sampling": manifest.reference or manifest.sampling,
        "guard": None,
        "cut": None,
        "caching": None,
    }
    engines = {name: target.components[source] for name, source in names.items()}
    alone = dataclasses.replace(bundle, manifest=manifest.model_copy(update=fields))
    return alone, target.model_copy(update={"components": engines, "early_exit": None})
