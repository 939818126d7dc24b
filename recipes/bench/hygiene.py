"""What the form of a graph gains: a denoiser as torch exports it, in the form that engines fuse best, and cut.

    python recipes/bench/hygiene.py recipes/shapes-circles.toml -o recipes/bench/hygiene/shapes-circles.json

Nodes of the graph, layers that an engine spends time in by its own profiler, and time of a guided evaluation, in turn.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import onnx
from denoisers import random_inputs

from slipcast.bundle.manifest import Component
from slipcast.engines import Engine, ProfiledEngine, open_engine
from slipcast_compiler.bench.figures import spread
from slipcast_compiler.engines import BUILDERS
from slipcast_compiler.export.component import export_component, write_component
from slipcast_compiler.export.parts import export_parts
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.machine import load_average, this_machine
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.reading import read_recipe
from slipcast_compiler.recipe.sampling import CutTable

ENGINES = {"openvino": "bf16", "onnxruntime": "fp32"}
ROUNDS, PAUSE_S = 40, 0.02  # between two engines: thread pools spin for a while after their work


def graphs(plan: Plan, cache: Cache, scratch: Path) -> dict[str, Path]:
    """Form -> directory with denoiser.onnx and its contract."""
    plain = scratch / "exported"
    plain.mkdir()
    with patch("slipcast_compiler.export.component.tidy", lambda graph: None):
        contract = write_component(plan.checkpoint, "denoiser", plan.original.sizes, plain)
    (plain / "denoiser.json").write_text(contract.model_dump_json())
    tidied = export_component(plan.original, "denoiser", cache)
    return {"exported": plain, "tidied": tidied, "cut": export_parts(tidied, CutTable().general, cache)["denoiser"]}


def measure(engine: str, forms: dict[str, Path], scratch: Path) -> dict[str, dict[str, Any]]:
    """By form: layers, seconds, and the ratio of the exported graph's seconds to them, round by round."""
    opened: dict[str, tuple[Engine, dict[str, Any]]] = {}
    layers, seconds = dict[str, int](), dict[str, list[float]]()
    with ExitStack() as stack:
        for form, folder in forms.items():
            out = scratch / f"{engine}-{form}"
            out.mkdir()
            files = BUILDERS[engine](folder / "denoiser.onnx", ENGINES[engine], out)
            paths = out / files.model, out / files.weights if files.weights else None
            contract = Component.model_validate_json((folder / "denoiser.json").read_text())
            known = {spec.name for spec in contract.inputs}
            inputs = {name: array for name, array in random_inputs(contract, 2, 0, 1).items() if name in known}
            with open_engine(engine, *paths, ENGINES[engine], contract, profile=True) as run:
                profiled = cast(ProfiledEngine, run)
                profiled(inputs)
                profiled.start_profile()
                profiled(inputs)
                layers[form] = len(profiled.layers())
            opened[form] = stack.enter_context(open_engine(engine, *paths, ENGINES[engine], contract)), inputs
        names = list(opened)
        for turn in range(-2, ROUNDS):
            for form in names[turn % len(names) :] + names[: turn % len(names)]:
                run, inputs = opened[form]
                time.sleep(PAUSE_S)
                begin = time.perf_counter()
                run(inputs)
                if turn >= 0:
                    seconds.setdefault(form, []).append(time.perf_counter() - begin)
    ratios = {form: [a / b for a, b in zip(seconds["exported"], of, strict=True)] for form, of in seconds.items()}
    return {
        form: {"layers": layers[form], "seconds": spread(seconds[form]), "ratio": spread(ratios[form])}
        for form in forms
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    load, plan = load_average(), make_plan(read_recipe(given.recipe), given.recipe.parent)
    with tempfile.TemporaryDirectory(prefix="slipcast-hygiene-") as name:
        forms = graphs(plan, Cache(Path("artifacts/cache")), Path(name))
        nodes = {
            form: len(onnx.load(folder / "denoiser.onnx", load_external_data=False).graph.node)
            for form, folder in forms.items()
        }
        targets = {engine: measure(engine, forms, Path(name)) for engine in ENGINES}
    document = {
        "schema": "slipcast-hygiene/1",
        "name": plan.recipe.name,
        "command": shlex.join(["python", "recipes/bench/hygiene.py", str(given.recipe), "-o", str(given.output)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": this_machine().model_dump() | {"load_before": load},
        "image": "{}x{}".format(*plan.original.size),
        "precisions": ENGINES,
        "nodes": nodes,
        "targets": targets,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8")
    print(json.dumps({engine: {f: v["ratio"]["median"] for f, v in of.items()} for engine, of in targets.items()}))


if __name__ == "__main__":
    main()
