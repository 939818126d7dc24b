"""Calls of a captured program's components, while it runs for some images at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from slipcast.bundle.program import ProgramCall
from slipcast.engines import Array
from slipcast.engines.resources import out_of_memory
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
            outputs = self._run(call.component, inputs)
            for name, value in call.outputs.items():
                if (array := outputs[name]).dtype.kind == "f":
                    # What depends on texts alone may be a mask for attention, with -inf for what is masked.
                    checked: Any = array if NOISE in self._depends[value] else np.maximum(array, 0)
                    check_finite(checked, f"{call.component}: {name} is not finite in {where}")
                self.values.put(value, image, array)

    def done(self, component: str) -> None:
        """Of an engine that is asked for no more."""
        self._engines.done(self._adapted.get(component, (component,))[0])

    def _run(self, called: str, inputs: dict[str, Array]) -> dict[str, Array]:
        component, slots = self._adapted.get(called, (called, {}))
        inputs |= slots
        try:
            return timed(self._engines(component), inputs, self._seconds, called)
        except Exception as error:
            if not out_of_memory(error):
                raise
            logger.warning("memory ran out in %s: trying again without other engines in memory", component)
            self._engines.free_others(component)
            return timed(self._engines(component), inputs, self._seconds, called)
