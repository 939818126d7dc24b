"""Adapters of low rank (LoRA), set while a bundle is loaded: arrays that components read, and nothing else changes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.engines import Array
from slipcast.errors import RequestError
from slipcast.run.lora import BY_FUSING, Pair, read_lora


class Adapters:
    """What was loaded. Of layers that an adapter leaves alone the slots are zero."""

    def __init__(self, manifest: ProgramManifest) -> None:
        record = manifest.adapters
        self._rank, layers = (record.rank, record.layers) if record else (0, ())
        self._components = record.components if record else {}
        slots = manifest.slots
        self._sizes = {name: (slots[f"down_{at}"][0], slots[f"up_{at}"][1]) for at, name in enumerate(layers)}
        self._wanted = {
            plain: [spec.name for spec in manifest.components[name].inputs if spec.name in slots]
            for plain, name in self._components.items()
        }
        self._loaded: dict[str, dict[str, Pair]] = {}

    @property
    def components(self) -> Mapping[str, str]:
        """By component, the one that takes its place while adapters are set."""
        return self._components

    def load(self, name: str, path: Path, component: str | None) -> None:
        """Read an adapter from a .safetensors file; RequestError where it does not fit."""
        if not self._sizes:
            raise RequestError(
                "this bundle has no slots for adapters",
                expected="a bundle that was compiled with [adapters]",
                hint=f"compile it with [adapters], or {BY_FUSING}",
            )
        if name in self._loaded:
            raise RequestError(f"there is an adapter {name!r} already", expected="another name, or unload_adapter")
        self._loaded[name] = read_lora(path, self._sizes, self._rank, component)

    def unload(self, name: str) -> None:
        """Forget one; RequestError where it is not there."""
        self._check(name)
        del self._loaded[name]

    def chosen(self, scales: Mapping[str, float]) -> dict[str, tuple[str, dict[str, Array]]]:
        """By component, what takes its place with these adapters, and its slots; nothing where none has a scale."""
        if not isinstance(scales, Mapping):
            raise RequestError("adapters are set by name", expected='{"style": 0.8}', got=type(scales).__name__)
        used = {name: self._scale(name, scale) for name, scale in scales.items()}
        if not (used := {name: scale for name, scale in used.items() if scale}):
            return {}
        arrays = {}
        for at, (layer, (inputs, outputs)) in enumerate(self._sizes.items()):
            pairs = [(self._loaded[name][layer], s) for name, s in used.items() if layer in self._loaded[name]]
            if (rank := sum(down.shape[1] for (down, _), _ in pairs)) > self._rank:
                raise RequestError(
                    f"these adapters are too much for the slots of {layer}",
                    expected=f"a rank of {self._rank} together",
                    got=str(rank),
                    hint="set fewer at once, or compile the bundle with a larger adapters.rank",
                )
            down, up = np.zeros((inputs, self._rank), np.float32), np.zeros((self._rank, outputs), np.float32)
            begin = 0
            for (own_down, own_up), scale in pairs:
                end = begin + own_down.shape[1]
                with np.errstate(over="ignore"):
                    down[:, begin:end], up[begin:end] = own_down, own_up * np.float32(scale)
                begin = end
            if not np.isfinite(up).all():
                raise RequestError("the scales are too large for float32", expected="smaller ones", got=repr(used))
            for kind, array in (("down", down), ("up", up)):
                array.setflags(write=False)
                arrays[f"{kind}_{at}"] = array
        return {
            plain: (self._components[plain], {name: arrays[name] for name in names})
            for plain, names in self._wanted.items()
        }

    def _check(self, name: object) -> None:
        if name not in self._loaded:
            raise RequestError(
                f"there is no adapter {name!r}",
                expected=", ".join(self._loaded) or "one that load_adapter has read",
                got=repr(name),
            )

    def _scale(self, name: object, scale: object) -> float:
        self._check(name)
        try:
            number = float(scale) if isinstance(scale, numbers.Real) and not isinstance(scale, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise RequestError(f"the scale of {name!r} is no number", expected="a finite number", got=repr(scale)[:100])
        return number
