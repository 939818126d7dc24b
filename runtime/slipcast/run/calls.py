"""Calls of a captured program's components, while it runs for some images at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from slipcast.bundle.program import ProgramCall
from slipcast.bundle.tiles import Tiling
from slipcast.engines import Array
from slipcast.engines.resources import out_of_memory
from slipcast.run.decoding import decode_frugally
from slipcast.run.loop import check_finite, timed
from slipcast.run.residency import InUse
from slipcast.run.values import NOISE, Values

logger = logging.getLogger("slipcast")

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Calls:
    """Evaluates calls on what is known, and puts what they give beside it. `depends`: see values.dependence; `adapted`:
    by component, what takes its place, and what that reads besides."""

    def __init__(
        self, values: Values, depends: Mapping[str, frozenset[str]], engines: InUse, seconds: dict[str, float],
        adapted: Mapping[str, tuple[str, Mapping[str, Array]]] = NOTHING,
    ) -> None:  # fmt: skip
        self.values, self._depends, self._engines, self._seconds = values, depends, engines, seconds
        self._adapted = adapted

    def __call__(
        self, call: ProgramCall, rows: Mapping[str, Array], where: str, images: Iterable[int] | None = None
    ) -> None:
        """One call, once for all images that share what it gives. `rows`: inputs that are no values; `where` it is, for
        the error of one that gives no numbers; `images`: that are in need of it, without them all."""
        for image in self.values.images(next(iter(call.outputs.values())), images):
            inputs = {**rows, **{name: self.values.get(value, image) for name, value in call.inputs.items()}}
            outputs = self._run(call, inputs)
            for name, value in call.outputs.items():
                if (array := outputs[name]).dtype.kind == "f":
                    # What depends on texts alone may be a mask for attention, with -inf for what is masked.
                    checked: Any = array if NOISE in self._depends[value] else np.maximum(array, 0)
                    check_finite(checked, f"{call.component}: {name} is not finite in {where}")
                self.values.put(value, image, array)

    def done(self, component: str) -> None:
        """Of an engine that is asked for no more."""
        self._engines.done(self._adapted.get(component, (component,))[0])

    def _run(self, call: ProgramCall, inputs: dict[str, Array]) -> dict[str, Array]:
        component, slots = self._adapted.get(call.component, (call.component, {}))
        inputs |= slots

        def evaluate(given: dict[str, Array]) -> dict[str, Array]:
            return timed(self._engines(component), given, self._seconds, call.component)

        if call.tiles:
            return self._decode(call, call.tiles, component, inputs, evaluate)
        try:
            return evaluate(inputs)
        except Exception as error:
            if not out_of_memory(error):
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
