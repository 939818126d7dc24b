"""What INT8 and pruning gain in a denoiser's time, on OpenVINO: engines alone, no pictures and no gate.

    python recipes/bench/denoisers.py recipes/sd15-shaped-int8.toml -o recipes/bench/denoisers/sd15-int8.json

The recipe's denoiser in bf16 and, as its [passes.quantize] says, in INT8; and both with 30 % of attention heads and of
feed-forward neurons removed. Weights may be random: which heads go is then without meaning, and so would be pictures.
Inputs have unit variance, as a sampler's scaled latents and a text encoder's normed output have. Engines are timed in
turn, in one process; what each needs of memory is measured apart. What is built is cached.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import Component, EngineFiles
from slipcast.engines import Engine, open_engine
from slipcast.progress import Advance, Stages
from slipcast_compiler.bench.figures import spread
from slipcast_compiler.engines import BUILDERS
from slipcast_compiler.export.component import export_component
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.graph import qdq
from slipcast_compiler.graph.cost import cost
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import load_average, this_machine
from slipcast_compiler.passes.apply import apply_passes
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.precision.quantize import quantize
from slipcast_compiler.recipe.reading import read_recipe

ENGINE = "openvino"
ROUNDS = 5
HALF = ", 30 % removed"
PRUNED = tuple(
    f'passes.{name}={{ratio=0.3, criterion="magnitude", correct=false}}' for name in ("prune_heads", "prune_ffn")
)

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """An engine's files, its contract, and what its denoiser costs on paper; `quantized`: the report of INT8."""

    precision: str
    folder: Path
    files: EngineFiles
    contract: Component
    cost: dict[str, int]
    quantized: dict[str, Any] | None

    def open(self) -> Engine:
        """For a with block."""
        weights = self.folder / self.files.weights if self.files.weights else None
        return open_engine(ENGINE, self.folder / self.files.model, weights, self.precision, self.contract)


def random_inputs(contract: Component, rows: int, number: int, of: int) -> Arrays:
    """One evaluation's, at the middle of part `number` of the timesteps."""
    rng = np.random.default_rng(number)
    inputs = {
        spec.name: rng.standard_normal([d if isinstance(d, int) else rows for d in spec.shape], np.float32)
        for spec in contract.inputs
    }
    return inputs | {"timestep": np.array([1000 * (number + 0.5) / of], np.float32)}


def write_samples(exported: Path, rows: int, count: int, out: Path, advance: Advance) -> None:
    """`count` evaluations with the fp32 graph's predictions, as calibration.py has them."""
    contract = Component.model_validate_json((exported / "denoiser.json").read_text())
    run = qdq.session(exported / "denoiser.onnx")
    (out / "denoiser").mkdir()
    for i in range(count):
        advance(i, count)
        inputs = random_inputs(contract, rows, i, count)
        np.savez(out / "denoiser" / f"{i:04}.npz", **inputs, **run(inputs))


def build(plan: Plan, cache: Cache, stages: Stages, title: str) -> dict[str, Built]:
    """By precision."""
    rewritten = apply_passes(plan.recipe.passes, plan.task, None, cache, stages)
    with stages.stage(f"export{title}"):
        exported = export_component(plan.original, "denoiser", cache, rewritten.rewrite)
    options = plan.recipe.quantize_options
    assert options
    with stages.stage(f"samples{title}") as advance:
        inputs = {"exported": exported.name, "rows": 2, "count": options.samples, "random": True}
        samples = cache.get(
            "calibration",
            inputs,
            lambda out: run_isolated(write_samples, exported, 2, options.samples, out, advance=advance),
        )
    with stages.stage(f"quantize{title}") as advance:
        graphs = Graphs(
            plan.recipe.name, plan.original, plan.family, plan.sampling, plan.reference, {"denoiser": exported}
        )
        graphs = quantize(graphs, samples, options, cache, advance)
    contract = Component.model_validate_json((exported / "denoiser.json").read_text())
    found = {}
    for precision, source in (("bf16", exported), ("int8", graphs.quantized["int8"]["denoiser"].folder)):
        with stages.stage(f"build {precision}{title}"):
            folder = cache.get(
                "bench-engine",
                {"source": source.name, "precision": precision},
                lambda out, source=source, precision=precision: run_isolated(_build, source, precision, out),
            )
        files = EngineFiles.model_validate_json((folder / "files.json").read_text())
        report = graphs.reports["quantize"] if precision == "int8" else None
        found[precision] = Built(precision, folder, files, contract, cost(exported / "denoiser.onnx"), report)
    return found


def _build(source: Path, precision: str, out: Path, _: Advance) -> None:
    files = BUILDERS[ENGINE](source / "denoiser.onnx", precision, out)
    (out / "files.json").write_text(files.model_dump_json())


def one_evaluation(built: Built, _: Advance) -> float:
    """Seconds to open it; of its process the peak is wanted."""
    begin = time.perf_counter()
    with built.open() as run:
        took = time.perf_counter() - begin
        run(random_inputs(built.contract, 2, 0, 1))
    return took


def time_in_turn(sides: dict[str, Built], advance: Advance) -> dict[str, list[float]]:
    """Seconds of ROUNDS evaluations, one row with and one without guidance's condition, after one that does not count.

    Another side is the first in every round, so that none always follows the same.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(built.open()) for name, built in sides.items()}
        inputs = random_inputs(next(iter(sides.values())).contract, 2, 0, 1)
        names = list(engines)
        for turn in range(ROUNDS + 1):
            advance(turn, ROUNDS + 1)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.perf_counter()
                engines[name](inputs)
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
    return seconds


def document(plan: Plan, command: str, sides: dict[str, Built], load: float | None, stages: Stages) -> dict[str, Any]:
    """Measure; plain JSON. `ratios` are bf16 / side, taken round by round: above 1 the side is faster."""
    with stages.stage("memory"):
        alone = {name: run_isolated(one_evaluation, built) for name, built in sides.items()}
    with stages.stage("evaluations, in turn") as advance:
        seconds = run_isolated(time_in_turn, sides, advance=advance).result
    first = next(iter(sides))
    ratios = {name: [a / b for a, b in zip(seconds[first], of, strict=True)] for name, of in seconds.items()}
    return {
        "schema": "slipcast-denoisers/1",
        "name": plan.recipe.name,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": this_machine().model_dump() | {"load_before": load},
        "computes_bf16": _computes_bf16(),
        "image": "{}x{}".format(*plan.original.size),
        "rows": 2,
        "quantize": next(built.quantized["options"] for built in sides.values() if built.quantized),
        "sides": {
            name: {
                "seconds": {**spread(of), "all": [round(each, 4) for each in of]},
                "ratio": spread(ratios[name]),
                "multiply_adds": built.cost["multiply_adds"],
                "parameters": built.cost["parameters"],
                "paper_ratio": sides[first].cost["multiply_adds"] / built.cost["multiply_adds"],
                "file_mb": round(sum(f.stat().st_size for f in built.folder.glob("denoiser.*")) / 1e6, 1),
                "peak_memory_mb": round(alone[name].peak_memory_mb, 1),
                "open_s": round(alone[name].result, 2),
                **({k: built.quantized[k] for k in ("layers", "quantised", "error")} if built.quantized else {}),
            }
            for name, built in sides.items()
            for of in (seconds[name],)
        },
        "stages_s": stages.seconds,
    }


def _computes_bf16() -> bool:
    from slipcast.engines.openvino import bf16_is_native

    return bf16_is_native()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--build-only", action="store_true", help="fill the cache and measure nothing")
    given = parser.parse_args()
    load, stages, cache = load_average(), Stages(), Cache(Path("artifacts/cache"))
    sides: dict[str, Built] = {}
    for title, overrides in (("", ()), (HALF, PRUNED)):
        plan = make_plan(read_recipe(given.recipe, overrides), given.recipe.parent)
        sides |= {f"{precision}{title}": built for precision, built in build(plan, cache, stages, title).items()}
    if given.build_only:
        return
    given.output.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "recipes/bench/denoisers.py", str(given.recipe), "-o", str(given.output)])
    made = document(plan, command, sides, load, stages)
    given.output.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", "utf-8")
    print(json.dumps({name: [side["seconds"]["median"], side["ratio"]] for name, side in made["sides"].items()}))


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    main()
