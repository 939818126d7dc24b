"""What it takes to build TensorRT-RTX engines without a GPU: time, memory and size, of every component of a recipe.

    python recipes/bench/builds.py recipes/shapes-circles.toml -o recipes/bench/builds/shapes-circles.json

Every component in fp16, and the denoiser in INT8 as [passes.quantize] says, each for the portable default and for SM86
with SM89. Builds run one at a time. What is done is kept in the cache, so that a run that was ended goes on; engines
are not kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import ImageGeometry
from slipcast.progress import Stages
from slipcast_compiler.engines import Source, sources_of, tensorrt
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.machine import load_average, this_machine
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.reading import read_recipe
from slipcast_compiler.recipe.targets import TargetTable

ENGINE = "tensorrt-rtx"
GPUS = ((), ("8.6", "8.9"))  # the portable default first
# The recipe's other targets are not built; one has to run here. INT8 for this one makes ranges symmetric.
TARGETS = f'targets=[{{engine="onnxruntime"}}, {{engine="{ENGINE}", precision="int8"}}]'


def sources(plan: Plan, cache: Cache, stages: Stages) -> dict[str, Mapping[str, Source]]:
    """By precision and component, the graphs as a compile makes them, without passes that rewrite the denoiser."""
    # Here, since the processes that build import this file, too, and torch would count as their memory.
    from slipcast_compiler.export.parts import cut_denoiser
    from slipcast_compiler.graphs import export_all
    from slipcast_compiler.model.rewrite import UNCHANGED
    from slipcast_compiler.precision.calibration import calibration_samples
    from slipcast_compiler.precision.quantize import quantize

    graphs, options = export_all(plan, UNCHANGED, cache, stages), plan.recipe.quantize_options
    if plan.recipe.cut:
        with stages.stage("cut denoiser"):
            graphs = cut_denoiser(graphs, plan.recipe.cut.general, cache)
    assert options
    with stages.stage("calibrate") as advance:
        samples = calibration_samples(graphs, plan.measuring, ("denoiser",), options.samples, cache, advance)
    with stages.stage("quantize denoiser") as advance:
        quantized = sources_of(quantize(graphs, samples, options, cache, advance), "int8")
    return {"fp16": sources_of(graphs).components, "int8": {"denoiser": quantized.components["denoiser"]}}


def build(image: ImageGeometry, name: str, source: Source, table: TargetTable, cache: Cache) -> dict[str, Any]:
    """One engine's figures."""
    options = tensorrt.options(table, name, image)

    def make(out: Path) -> None:
        load = load_average()
        made = tensorrt.make_engine(source.model, table.precision, out, options)
        figures = {
            "component": name,
            "precision": table.precision,
            "compute_capabilities": table.compute_capabilities or (),
            "seconds": round(made.seconds, 1),
            "peak_memory_mb": round(made.peak_memory_mb, 1),
            "engine_mb": round(made.engine.stat().st_size / 1e6, 2),
            "load_before": load,
        }
        (out / "figures.json").write_text(json.dumps(figures))
        made.engine.unlink()

    inputs = {
        "source": source.identity,
        "component": name,
        "precision": table.precision,
        "options": dataclasses.asdict(options),
    }
    entry = cache.get("bench-build", inputs, make)
    found: dict[str, Any] = json.loads((entry / "figures.json").read_text())
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    stages, cache = Stages(), Cache(Path("artifacts/cache"))
    plan = make_plan(read_recipe(given.recipe, (*given.overrides, TARGETS)), given.recipe.parent)
    image, builds = plan.original.image, []
    for precision, components in sources(plan, cache, stages).items():
        for name, source in components.items():
            for gpus in GPUS:
                table = TargetTable(engine=ENGINE, precision=precision, compute_capabilities=gpus or None)
                with stages.stage(f"{name} for {table.name}"):
                    builds.append(build(image, name, source, table, cache))
    words = [word for override in given.overrides for word in ("--set", override)]
    command = ["python", "recipes/bench/builds.py", str(given.recipe), *words, "-o", str(given.output)]
    made = {
        "schema": "slipcast-builds/1",
        "name": plan.recipe.name,
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": this_machine().model_dump(),
        "library": f"{ENGINE} {importlib.metadata.version('tensorrt_rtx')}",
        "image": f"{image.width}x{image.height}",
        "builds": builds,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
