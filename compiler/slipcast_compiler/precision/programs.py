"""A captured program's targets in INT8 and in half precision: the same as of others, measured on its own calls."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slipcast.bundle.program import Program
from slipcast.progress import Advance, Stages
from slipcast_compiler.engines.programs import ProgramGraphs, write_portable
from slipcast_compiler.engines.recording import digest_given, record_program
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.original import Images
from slipcast_compiler.precision.calibration import TRAJECTORIES
from slipcast_compiler.precision.casts import Casts, measure_on
from slipcast_compiler.precision.evaluations import Evaluations
from slipcast_compiler.precision.int4 import quantize_weights
from slipcast_compiler.precision.mixed import IMAGES, SAMPLES
from slipcast_compiler.precision.quantize import quantize_component
from slipcast_compiler.recipe.passes import Quantize, QuantizeInt4
from slipcast_compiler.recipe.targets import IN_INT8, TargetTable


def images_needed(samples: int | None, program: Program) -> int:
    """How many images to record for so many `samples` of each component: see calibration_samples; for casts alone,
    where there are none, IMAGES; one of each variant in any case."""
    count, steps = IMAGES, program.usual_steps
    if samples:
        count = min(samples, max(TRAJECTORIES, math.ceil(samples / max(steps, 1))))
    return max(count, len(program.every))


def record_calls(
    graphs: ProgramGraphs, images: Images, given: Sequence[Mapping[str, Any]], samples: int | None, cache: Cache,
    advance: Advance,
) -> Path:  # fmt: skip
    """A directory with evaluations of each component in fp32, COMPONENT/0000.npz and so on, from the cache or made:
    SAMPLES of each, or as many as quantisation is calibrated on. `given`: by variant, what its calls take besides a
    text."""
    # Of each image at least one: a variant may have components of its own.
    count, components = max(samples or SAMPLES, len(images)), tuple(graphs.contracts)
    digests = [digest_given(each) for each in given]

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".calibration-", dir=out.parent) as name:
            target = write_portable(graphs, Path(name), cache)
            arguments = Path(name), target.id, components, images, tuple(map(dict, given)), count, out
            run_isolated(record_program, *arguments, advance=advance)

    inputs = {**graphs.identity, "images": images, "given": digests, "count": count}
    return cache.get("calls", inputs, make)


def quantize_denoisers(
    graphs: ProgramGraphs, inputs: Path, options: Quantize, cache: Cache, advance: Advance
) -> ProgramGraphs:
    """With its denoisers in INT8 beside those in fp32, calibrated on what record_calls recorded.

    Guidance lies within them: so their outputs are what the scheduler is given. Raises RecipeError where a pattern of
    `protect` fits no layer.
    """
    made = {}
    for name, contract in graphs.contracts.items():
        if IN_INT8.fullmatch(name):
            outputs = tuple(spec.name for spec in contract.outputs)
            recorded = Evaluations(inputs / name, outputs, samples=options.samples)
            made[name] = quantize_component(graphs.entry, name, recorded, options, cache, advance)
    return replace(graphs, quantized={**graphs.quantized, "int8": made})


def quantize_program_weights(
    graphs: ProgramGraphs, inputs: Path, options: QuantizeInt4, cache: Cache, advance: Advance
) -> ProgramGraphs:
    """With the linear layers of its components in INT4 beside those in fp32; see int4.quantize_weights."""
    sources = graphs.sources()
    contracts = {name: each for name, each in graphs.contracts.items() if name not in sources.exact}
    recorded = {
        name: Evaluations(inputs / name, tuple(spec.name for spec in contract.outputs), samples=options.samples)
        for name, contract in contracts.items()
    }
    folders = {name: sources.components[name].model.parent for name in contracts}
    made = quantize_weights(folders, recorded, options, cache, advance)
    return replace(graphs, quantized={**graphs.quantized, "int4": made})


def measure_program_casts(
    graphs: ProgramGraphs, inputs: Path, tables: tuple[TargetTable, ...], cache: Cache, stages: Stages
) -> Casts:
    """casts.measure_casts, on what record_calls recorded."""
    sources = graphs.sources()
    cast = {name: source for name, source in sources.components.items() if name not in sources.exact}
    return measure_on(inputs, cast, graphs.quantized, tables, cache, stages)
