"""Targets in half precision: what stays in fp32 of each, measured on what a bundle will draw with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slipcast.bundle.manifest import Target
from slipcast.progress import Stages
from slipcast_compiler.engines import Source, sources_of
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.precision.calibration import record_inputs
from slipcast_compiler.precision.mixed import IMAGES, SAMPLES, Found, check_cast, measure_cast
from slipcast_compiler.recipe.targets import TargetTable


@dataclass(frozen=True)
class Casts:
    """By the name of each target in half precision, what was found; and the inputs that it is of. `quantized`: by
    precision, the components that are."""

    tables: tuple[TargetTable, ...]
    found: dict[str, Found]
    inputs: Path | None
    quantized: Mapping[str, Collection[str]]

    def check(self, folder: Path, targets: Sequence[Target], stages: Stages) -> None:
        """mixed.check_cast of the bundle at `folder`, which has targets in the order of their tables."""
        for table, target in zip(self.tables, targets, strict=True):
            if found := self.found.get(table.name):
                assert self.inputs
                check_cast(folder, target, self.quantized.get(target.precision, ()), found, self.inputs, stages)


def measure_casts(graphs: Graphs, tables: tuple[TargetTable, ...], cache: Cache, stages: Stages) -> Casts:
    """mixed.measure_cast of every target in half precision.

    What is quantised is measured as it was before: its nodes have the same names, and what rounding adds to its error
    is lost among its steps. What was recorded to calibrate it is taken for all.
    """
    if not any(table.half for table in tables):
        return Casts(tables, {}, None, {})
    inputs = next((made.samples.parent for each in graphs.quantized.values() for made in each.values()), None)
    if not inputs or not all((inputs / name).is_dir() for name in graphs.components):  # what draws strangers is not
        with stages.stage("record inputs") as advance:
            inputs = record_inputs(_shortened(graphs), tuple(graphs.components), IMAGES, SAMPLES, cache, advance)
    return measure_on(inputs, sources_of(graphs).components, graphs.quantized, tables, cache, stages)


def measure_on(
    inputs: Path, sources: Mapping[str, Source], quantized: Mapping[str, Collection[str]],
    tables: tuple[TargetTable, ...], cache: Cache, stages: Stages,
) -> Casts:  # fmt: skip
    """The same of graphs in fp32, on what was recorded of them; `quantized`: see Casts."""
    with stages.stage("measure casts") as advance:
        found = {table.name: measure_cast(table, sources, inputs, cache, advance) for table in tables if table.half}
    return Casts(tables, found, inputs, quantized)


def _shortened(graphs: Graphs) -> Graphs:
    """Sampled in few steps, which cover all noise levels too; but masks of [caching] are of all steps, and a list of
    levels has its own length."""
    sampling = graphs.sampling
    if not sampling.schedule or graphs.caching:
        return graphs
    return replace(graphs, sampling=sampling.model_copy(update={"steps": min(SAMPLES, sampling.steps)}))
