"""What a bundle is built from, whichever its targets: the graphs of its components, and what goes beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from slipcast.bundle.manifest import Caching, Component, EngineFiles, Sampling
from slipcast_compiler.model.original import Images, Original, calibration_images
from slipcast_compiler.recipe.family import Family
from slipcast_compiler.recipe.recipe import GuardTable

Check = Callable[[str, Path, EngineFiles], None]  # (engine, folder, its files): raises where it reads INT8 wrongly
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Quantized:
    """A component in INT8 or INT4: a directory with NAME.onnx and its weights, what it was calibrated on, and what
    engines are checked by."""

    folder: Path
    samples: Path
    check: Check


@dataclass(frozen=True)
class Graphs:
    """`components`: by name, an entry of the cache with NAME.onnx, NAME.onnx.data and NAME.json, its contract.

    `sampling`: what the bundle runs; `reference`: what the original does. `step`: where the graph is that a table of
    timesteps is made with; `prompts`: a table of the `closed` family's; `caching`: which steps are shallow; `guard`:
    what tells strangers, by the recipe's table; `quantized`: by precision, by component, what takes its place there;
    `profile`: what passes chose by. `fields`: what the manifest says besides; `reports`: by stage, what the report
    tells.
    """

    name: str
    original: Original
    family: Family | None
    sampling: Sampling
    reference: Sampling
    components: Mapping[str, Path]
    step: Path | None = None
    prompts: Path | None = None
    closed: tuple[str, ...] = ()
    caching: Caching | None = None
    guard: tuple[GuardTable, Path] | None = None
    quantized: Mapping[str, Mapping[str, Quantized]] = field(default_factory=dict)
    profile: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[str, Any] = field(default_factory=dict)

    def add(
        self, components: Mapping[str, Path] = NOTHING, report: Mapping[str, Any] = NOTHING, **changes: Any
    ) -> Self:
        """With these components in place of, or beside, its own; and what a stage reports."""
        return replace(
            self, components={**self.components, **components}, reports={**self.reports, **report}, **changes
        )

    def without(self, names: tuple[str, ...]) -> Self:
        """Without some of the components."""
        return replace(self, components={k: v for k, v in self.components.items() if k not in names})

    def calibration(self, count: int) -> Images:
        """So many images of calibration prompts."""
        return calibration_images(self.family.calibration if self.family else (None,), count)

    @property
    def contracts(self) -> dict[str, Component]:
        """What the engines of each component take and return."""
        return {
            name: Component.model_validate_json((folder / f"{name}.json").read_text())
            for name, folder in self.components.items()
        }

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what engines are built, and what a run of them gives; plain JSON, for the cache's keys."""
        return {
            "components": {name: folder.name for name, folder in self.components.items()},
            "table": self.prompts and self.prompts.parent.name,
            "sampling": self.sampling.model_dump(mode="json"),
            "reference": self.reference.model_dump(mode="json"),
            "caching": self.caching and self.caching.model_dump(mode="json"),
            "guard": self.guard and [self.guard[0].model_dump(mode="json"), self.guard[1].name],
            "image": self.original.image.model_dump(mode="json"),
            "source": self.original.checkpoint.sha256,
        }
