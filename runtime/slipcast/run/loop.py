"""What evaluates a denoiser within the sampling loop: engines, what they are given of prompt and timestep, and rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import SHALLOW, Component, ImageGeometry
from slipcast.engines import Engine
from slipcast.errors import NumericalError
from slipcast.run.caching import Features
from slipcast.run.step_table import Row, told

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int_]

ATTENTION_BYTES = 2**26  # what more than one image in a call of the denoiser may need for attention scores


class Evaluator:
    """The model as sampling.guidance.Guided evaluates it: (scaled x, timestep, both branches?) -> their outputs.

    `left()`: the images that are evaluated; the others' outputs are their inputs.
    """

    def __init__(
        self,
        engines: Mapping[str, tuple[Engine, Component]],
        component: str,
        conditioning: Mapping[str, Floats],
        rows: Mapping[float, Row],
        *,
        images: int,
        at_once: int,
        left: Callable[[], Indices],
        seconds: dict[str, float],
        features: Features | None = None,
        sealed: bool = False,
    ) -> None:
        """`engines`: by component, with their contracts; `component` is the whole denoiser. `conditioning`: what
        depends on the prompt, a row for each image or, unconditional rows first, two. `rows`: what depends on the
        timestep, where it was computed beforehand. So many `images`, of which a call takes `at_once` at the most.
        `sealed`: what stays the same is marked as such, for engines that send it to a device once.
        """
        self._engines, self._component = engines, component
        self._wanted = {name: {spec.name for spec in contract.inputs} for name, (_, contract) in engines.items()}
        self._conditioning, self._rows, self._features = conditioning, rows, features
        self._images, self._at_once, self._sealed = images, at_once, sealed
        self._left, self._seconds = left, seconds
        self._groups: dict[bool, tuple[int, list[tuple[Indices, Row]]]] = {}

    def __call__(self, x: Floats, timestep: float, both: bool) -> tuple[Floats, Floats | None]:
        full = self._features is None or self._features.begin(both)
        of_step = {"timestep": np.array([timestep], np.float32)} | self._rows.get(told(timestep), {})
        conditional, unconditional = x.copy(), x.copy() if both else None
        for images, of_prompt in self._calls(both):
            batch = np.concatenate([x[images], x[images]]) if both else x[images]
            known = {"sample": batch} | of_step | of_prompt
            output = self._full(images, known) if full else self._shallow(images, both, known)
            conditional[images] = output[-len(images) :]
            if unconditional is not None:
                unconditional[images] = output[: len(images)]
        return conditional, unconditional

    def _full(self, images: Indices, known: dict[str, Floats]) -> Floats:
        outputs = self._run(self._component, known)
        if self._features:
            self._features.keep(images, outputs)
        return outputs["prediction"]

    def _shallow(self, images: Indices, both: bool, known: dict[str, Floats]) -> Floats:
        assert self._features
        return self._run(SHALLOW, known | self._seal(self._features.of(images, both)))["prediction"]

    def _run(self, component: str, known: dict[str, Floats]) -> dict[str, Floats]:
        inputs = {name: value for name, value in known.items() if name in self._wanted[component]}
        return timed(self._engines[component][0], inputs, self._seconds, component)

    def _calls(self, both: bool) -> list[tuple[Indices, Row]]:
        """The images of each call, and what is given of their prompts."""
        # Once for as long as they are the same: an engine knows an array that it was given before.
        left = self._left()
        count, groups = self._groups.get(both, (0, []))
        if count != len(left):
            chunks = np.split(left, range(self._at_once, len(left), self._at_once))
            groups = [
                (
                    each,
                    self._seal({k: chosen_rows(v, self._images, each, both) for k, v in self._conditioning.items()}),
                )
                for each in chunks
            ]
            self._groups[both] = len(left), groups
        return groups

    def _seal(self, arrays: Row) -> Row:
        if self._sealed:  # an engine on a device keeps there what cannot change, and is sent it once
            for array in arrays.values():
                array.setflags(write=False)
        return arrays


def images_at_once(image: ImageGeometry, device: str, images: int) -> int:
    """So many images go through the denoiser in one call.

    CPU engines hold attention scores, heads * cells^2 floats a row: 1 GB for one guided image of 64x64 cells. How
    many heads is not in the manifest; 8 at full resolution is the most of common U-Nets. From 32x32 cells on images
    go one by one: more at once are not faster there, and OpenVINO chooses other kernels for some batch sizes (3 of
    1 to 8, for a U-Net of Stable Diffusion 1.5), whose rounding would make pictures depend on the batch.
    """
    _, height, width = image.latent_shape
    if device != "cpu":
        return images
    return min(images, max(1, ATTENTION_BYTES // (2 * 8 * 4 * (height * width) ** 2)))


def chosen_rows(array: Floats, images: int, chosen: Indices | list[int], both: bool) -> Floats:
    """Rows of the chosen images, of which each has one or, unconditional rows first, two: the last, or `both`."""
    rows = array.reshape(-1, images, *array.shape[1:])[None if both else -1 :, chosen]
    return rows.reshape(-1, *array.shape[1:])


def timed(engine: Engine, inputs: dict[str, Any], seconds: dict[str, float], name: str) -> dict[str, Any]:
    """What the engine gives; the time it takes is added to seconds[name]."""
    clock = time.perf_counter()
    outputs = engine(inputs)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - clock
    return outputs


def check_finite(values: Floats, problem: str) -> None:
    """NumericalError, with what is the problem, where any is NaN or infinity."""
    if not np.isfinite(values).all():
        raise NumericalError(
            problem,
            expected="finite numbers",
            got="NaN or infinity",
            hint="try a target of higher precision, or a lower guidance_scale",
        )
