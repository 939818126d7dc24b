"""Calls of a captured program's components, while it runs for some images at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from slipcast.bundle.program import ProgramCall
from slipcast.bundle.tiles import Tiling
from slipcast.engines import Array
from slipcast.engines.resources import out_of_memory
from slipcast.errors import ArtifactError
from slipcast.run.decoding import decode_frugally
from slipcast.run.loop import check_finite, timed
from slipcast.run.residency import InUse
from slipcast.run.values import NOISE, Values

logger = logging.getLogger("slipcast")

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Together:
    """How a component takes several images in a call, `most` of them: the `inputs` that have rows of each, and how many
    an output has. What others are, they are for all."""

    inputs: frozenset[str]
    outputs: Mapping[str, int]
    most: int


class Calls:
    """Evaluates calls on what is known, and puts what they give beside it. `depends`: see values.dependence;
    `together`: by component, see Together; `adapted`: by component, what takes its place, and what that reads besides.
    """

    def __init__(
        self, values: Values, depends: Mapping[str, frozenset[str]], engines: InUse, seconds: dict[str, float],
        together: Mapping[str, Together] = NOTHING, adapted: Mapping[str, tuple[str, Mapping[str, Array]]] = NOTHING,
    ) -> None:  # fmt: skip
        self.values, self._depends, self._engines, self._seconds = values, depends, engines, seconds
        self._together, self._adapted = together, adapted
        self._alone = set[str]()  # components for which memory ran out where there were several images
        self._joined: dict[tuple[str, str], tuple[list[Array], Array]] = {}

    def __call__(
        self, call: ProgramCall, rows: Mapping[str, Array], where: str, images: Iterable[int] | None = None
    ) -> None:
        """One call, once for all images that share what it gives. `rows`: inputs that are no values; `where` it is, for
        the error of one that gives no numbers; `images`: that are in need of it, without them all."""
        for group in self._groups(call, self.values.images(next(iter(call.outputs.values())), images)):
            outputs = self._run_group(call, rows, group)
            for name, value in call.outputs.items():
                if (array := outputs[name]).dtype.kind == "f":
                    # What depends on texts alone may be a mask for attention, with -inf for what is masked.
                    checked: Any = array if NOISE in self._depends[value] else np.maximum(array, 0)
                    check_finite(checked, f"{call.component}: {name} is not finite in {where}")
                for image, own in zip(group, self._apart(call, name, array, len(group)), strict=True):
                    self.values.put(value, image, own)

    def done(self, component: str) -> None:
        """Of an engine that is asked for no more."""
        self._engines.done(self._adapted.get(component, (component,))[0])
        for key in [key for key in self._joined if key[0] == component]:
            del self._joined[key]

    def _groups(self, call: ProgramCall, images: list[int]) -> list[list[int]]:
        """Of images that go into one call: those whose arrays are of the same shapes, as many as it takes."""
        together = self._together.get(call.component)
        if not together or together.most == 1 or len(images) == 1 or call.component in self._alone:
            return [[image] for image in images]
        alike: dict[Any, list[int]] = {}
        for image in images:
            shapes = tuple(self.values.get(value, image).shape for value in call.inputs.values())
            alike.setdefault(shapes, []).append(image)
        return [each[i : i + together.most] for each in alike.values() for i in range(0, len(each), together.most)]

    def _run_group(self, call: ProgramCall, rows: Mapping[str, Array], group: list[int]) -> dict[str, Array]:
        """Its outputs, of all images of the group one after another."""
        if len(group) == 1:
            given = {name: self.values.get(value, group[0]) for name, value in call.inputs.items()}
            return self._run(call, {**rows, **given})
        if call.component not in self._alone:
            given = {name: self._join(call.component, name, value, group) for name, value in call.inputs.items()}
            try:
                return self._run(call, {**rows, **given}, last=False)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                logger.warning("memory ran out in %s for %d images: one at a time", call.component, len(group))
                self._alone.add(call.component)
        alone = [self._run_group(call, rows, [image]) for image in group]
        several = self._together[call.component].outputs
        return {
            name: np.concatenate([each[name] for each in alone]) if name in several else array
            for name, array in alone[0].items()
        }

    def _apart(self, call: ProgramCall, name: str, array: Array, images: int) -> list[Array]:
        """Each image's of an output."""
        if images == 1 or name not in self._together[call.component].outputs:
            return [array] * images
        rows = self._together[call.component].outputs[name]
        if len(array) != rows * images:
            raise ArtifactError(
                f"{call.component}: {name} is not what the manifest says",
                expected=f"{rows * images} rows, of {images} images",
                got=f"{len(array)}",
                hint="compile the bundle again",
            )
        return [array[i * rows : (i + 1) * rows] for i in range(images)]

    def _join(self, component: str, name: str, value: str, group: list[int]) -> Array:
        """The arrays of some images as one, which stays the same while they do: engines know it again."""
        arrays = [self.values.get(value, image) for image in group]
        if name not in self._together[component].inputs:
            return arrays[0]
        known, joined = self._joined.get((component, name), ([], arrays[0]))
        if len(known) != len(arrays) or any(one is not other for one, other in zip(known, arrays, strict=True)):
            joined = np.concatenate(arrays)
            joined.setflags(write=any(array.flags.writeable for array in arrays))
            self._joined[component, name] = arrays, joined
        return joined

    def _run(self, call: ProgramCall, inputs: dict[str, Array], last: bool = True) -> dict[str, Array]:
        """`last`: whether there is nothing left to try but more room, where memory runs out."""
        component, slots = self._adapted.get(call.component, (call.component, {}))
        inputs |= slots

        def evaluate(given: dict[str, Array]) -> dict[str, Array]:
            return timed(self._engines(component), given, self._seconds, call.component)

        if call.tiles:
            return self._decode(call, call.tiles, component, inputs, evaluate)
        try:
            return evaluate(inputs)
        except Exception as error:
            if not last or not out_of_memory(error):
                raise
            logger.warning("memory ran out in %s: trying again without other engines in memory", component)
            self._engines.free_others(component)
            return evaluate(inputs)

    def _decode(
        self, call: ProgramCall, tiles: Tiling, component: str, inputs: dict[str, Array],
        evaluate: Callable[[dict[str, Array]], dict[str, Array]],
    ) -> dict[str, Any]:  # fmt: skip
        """As evaluate(inputs), tile by tile; with the statistics of the whole, where it takes such."""
        (output,), statistics = call.outputs, tiles.statistics
        none = {statistics.input: np.zeros(statistics.size, np.float32)} if statistics else {}
        besides: dict[str, Any] = dict(none)

        def decode(tile: Any) -> Any:
            return evaluate({**inputs, **besides, tiles.input: tile})[output]

        def measure(small: Any) -> None:
            assert statistics
            besides[statistics.input] = evaluate({**inputs, **none, tiles.input: small})[statistics.output]

        latent: Any = inputs[tiles.input]
        free = partial(self._engines.free_others, component)
        return {output: decode_frugally(decode, latent, tiles, free, measure if statistics else None)}
