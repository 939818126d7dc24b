"""Memory that one component adds to a process. Run as a module it measures, with a job on stdin and JSON on stdout."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from slipcast.bundle.manifest import Component, Target
from slipcast.bundle.reader import BaseBundle
from slipcast.engines import ENGINES, Array, open_engine
from slipcast.timing.memory import peak_mb, resident_mb

logger = logging.getLogger("slipcast")


def measure_component(
    bundle: BaseBundle, target: Target, component: str, inputs: Mapping[str, Array]
) -> dict[str, float] | None:
    """`added_mb`: resident after opening the component and calling it once with inputs of these shapes, less before.
    `peak_mb`: the most that was resident on the way, less before. None, with a warning, where its process fails.

    In a process of its own: in one for all, what one component has freed hides what the next one takes.
    """
    name = cast(Any, component)
    files = target.components[name]
    job = {
        "engine": target.engine,
        "precision": target.precision,
        "model": str(bundle.path(files.model)),
        "weights": str(bundle.path(files.weights)) if files.weights else None,
        "contract": bundle.manifest.components[name].model_dump(mode="json"),
        "inputs": {name: [str(array.dtype), array.shape] for name, array in inputs.items()},
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        logger.warning("the memory of %s is not known: its process ended with %s", component, last[0])
        return None
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _measure(job: dict[str, Any]) -> dict[str, float]:
    importlib.import_module(ENGINES[job["engine"]].module)  # the library is there whatever the component
    contract = Component.model_validate_json(json.dumps(job["contract"]))
    weights = Path(job["weights"]) if job["weights"] else None
    before = resident_mb()
    with open_engine(job["engine"], Path(job["model"]), weights, job["precision"], contract) as engine:
        engine({name: np.zeros(shape, dtype) for name, (dtype, shape) in job["inputs"].items()})
        return {"added_mb": round(resident_mb() - before, 1), "peak_mb": round(peak_mb() - before, 1)}


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
