"""What was measured, added up. Seconds are of one run: means over the profiled runs, so that all parts add up."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import slipcast
from slipcast.bundle.manifest import Manifest, Target
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.engines import ENGINES, LayerTime, cpu_threads
from slipcast.timing.clock import Run

NOTES = (
    "Times and shares are of one run with the profiler on, the mean of those that were made; the overhead compares each"
    " with a run without it.",
    "Outside its layers: the engine's own work between layers, and what rounding lost, since engines count "
    "whole microseconds and hundreds of small layers take less.",
    "Host: everything outside the engines: tokenizing, noise, the sampler's and guidance's arithmetic, pictures.",
    "Memory is resident memory (RSS). Of a component: what opening it and one call add to a process of its own, and "
    "the most on the way. The peak of the run is of this process without the profiler, Python and libraries included.",
)


@dataclass(frozen=True)
class Measured:
    """`plain` and `profiled` runs after a `first_s` that warmed up, one after the other where `in_turn`; `layers` are
    of all profiled runs together. `memory`: by component, where it is known. `before_mb`: resident before loading."""

    first_s: float
    plain: list[Run]
    profiled: list[Run]
    in_turn: bool
    layers: dict[str, tuple[LayerTime, ...]]
    before_mb: float
    peak_mb: float
    memory: dict[str, dict[str, float] | None]


def make_document(
    manifest: Manifest | ProgramManifest, target: Target, request: dict[str, Any], measured: Measured
) -> dict[str, Any]:
    """One JSON document. `seconds` = the components' + `host_s` = the steps' + `outside_steps_s`; a component's
    seconds = its layers' + `outside_layers_s`, and its layers' are also summed by kind in `operators`."""
    runs, count = measured.profiled, len(measured.profiled)
    total, calls, ends = _mean([run.total for run in runs]), _mean_calls(runs), _mean_steps(runs)
    layers: list[dict[str, Any]] = [
        {
            "component": component,
            "name": layer.name,
            "module": layer.module,
            "kind": layer.kind,
            "kernel": layer.kernel,
            "seconds": layer.seconds / count,
            "calls": layer.calls // count,
        }
        for component, found in measured.layers.items()
        for layer in found
    ]
    layers.sort(key=lambda layer: -layer["seconds"])
    components = [_component(name, calls, layers, total, measured.memory[name]) for name in measured.layers]
    plain, profiled = ([run.total for run in runs] for runs in (measured.plain, measured.profiled))
    ratios = [with_it / without for with_it, without in zip(profiled, plain, strict=True)]
    steps = _steps(calls, ends)
    library = importlib.import_module(ENGINES[target.engine].library)
    return {
        "name": manifest.name,
        "target": target.id,
        "precision": target.precision,
        "versions": {"slipcast": slipcast.__version__, library.__name__: library.__version__},
        "cpu_threads": cpu_threads(),
        "prompt": request["prompt"],
        "seed": request["seed"],
        "num_images": request["num_images_per_prompt"],
        "sampler": manifest.program.pipeline if isinstance(manifest, ProgramManifest) else manifest.sampling.sampler,
        "seconds": total,
        "first_run_s": measured.first_s,
        "without_profiler_s": statistics.median(plain),
        "profiler_overhead": statistics.median(ratios) - 1,
        "runs": {
            "without_profiler_s": plain,
            "with_profiler_s": profiled,
            "overheads": [ratio - 1 for ratio in ratios],
            "in_turn": measured.in_turn,
        },
        "components": components,
        "host_s": total - sum(component["seconds"] for component in components),
        "steps": steps,
        "outside_steps_s": total - sum(step["seconds"] for step in steps),
        "operators": _operators(layers),
        "layers": layers,
        "timeline": [{"component": name, "begin_s": begin, "end_s": end} for name, begin, end in calls],
        "memory": {"before_mb": measured.before_mb, "peak_mb": measured.peak_mb},
        "notes": list(NOTES),
    }


def _component(
    name: str,
    calls: list[tuple[str, float, float]],
    layers: list[dict[str, Any]],
    total: float,
    memory: dict[str, float] | None,
) -> dict[str, Any]:
    times = [end - begin for component, begin, end in calls if component == name]
    inside = sum(layer["seconds"] for layer in layers if layer["component"] == name)
    return {
        "name": name,
        "calls": len(times),
        "seconds": sum(times),
        "share": sum(times) / total,
        "outside_layers_s": sum(times) - inside,
        "memory": memory,
    }


def _steps(calls: list[tuple[str, float, float]], ends: list[tuple[float | None, float]]) -> list[dict[str, Any]]:
    """The first step begins with the denoiser's first call, each other where the one before it ended."""
    steps, begin = [], next((start for name, start, _ in calls if name == "denoiser"), 0.0)
    for number, (timestep, end) in enumerate(ends, 1):
        parts: dict[str, float] = {}
        for name, start, stop in calls:
            if begin <= start < end:
                parts[name] = parts.get(name, 0.0) + stop - start
        steps.append(
            {"step": number, "timestep": timestep, "begin_s": begin, "seconds": end - begin, "components": parts}
        )
        begin = end
    return steps


def _operators(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for layer in layers:
        key = layer["component"], layer["kind"]
        entry = sums.setdefault(key, {"component": key[0], "kind": key[1], "seconds": 0.0, "layers": 0})
        entry["seconds"] += layer["seconds"]
        entry["layers"] += 1
    return sorted(sums.values(), key=lambda entry: -entry["seconds"])


def _mean_calls(runs: Sequence[Run]) -> list[tuple[str, float, float]]:
    """Runs of one request make the same calls in the same order."""
    return [
        (same[0][0], _mean([begin for _, begin, _ in same]), _mean([end for *_, end in same]))
        for same in zip(*(run.calls for run in runs), strict=True)
    ]


def _mean_steps(runs: Sequence[Run]) -> list[tuple[float | None, float]]:
    pairs = zip(*(run.steps for run in runs), strict=True)
    return [(None if same[0][0] is None else float(same[0][0]), _mean([end for _, end in same])) for same in pairs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
