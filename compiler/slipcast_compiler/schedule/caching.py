"""[caching]: the shallow denoiser beside the full one, and the steps that it is good for, measured on the family.

The mask is chosen by dynamic programming on the error of every reuse: what a step gives with the features of each step
before it, against what it gives with its own, on the trajectories of calibration prompts.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import SHALLOW, Caching, Component
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast_compiler.engines.contents import PORTABLE, write_bundle
from slipcast_compiler.export.component import contract_of
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.graph.cost import cost
from slipcast_compiler.graph.shallow import find_cut, full_model, place, shallow_model
from slipcast_compiler.graph.weights import load, save_sharing
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.recipe.sampling import CachingTable
from slipcast_compiler.schedule.reuse import measure_reuse

Errors = npt.NDArray[np.float64]

IMAGES = 8  # trajectories that are measured
FULL = "denoiser"
CUT, MEASURED = "cut.json", "reuse.json"


def cache_features(graphs: Graphs, table: CachingTable, cache: Cache, advance: Advance) -> Graphs:
    """With a full and a shallow denoiser in place of the one, as [caching] asks, and the mask of steps chosen."""
    everything = split_denoiser(graphs, table.share, cache)
    cut = json.loads((everything.components[FULL] / CUT).read_text())
    full = table.full_of(graphs.sampling.steps)
    measured = _measure(everything, longest_of(graphs.sampling.steps, full), cache, advance)
    mask, error = choose(measured, full)
    report = {**cut, "mask": list(mask), "full_steps": full, "error": error, "images": IMAGES}
    assert everything.caching
    record = everything.caching.model_copy(update={"mask": mask})
    return everything.add(report={"caching": report}, caching=record)


def split_denoiser(graphs: Graphs, share: float, cache: Cache) -> Graphs:
    """With the full and the shallow denoiser, and all steps in full."""
    folder = export_split(graphs.components[FULL], share, cache)
    cut = json.loads((folder / CUT).read_text())
    contract = Component.model_validate_json((folder / f"{SHALLOW}.json").read_text())
    features = tuple(spec for spec in contract.inputs if spec.name == cut["feature"])
    record = Caching(features=features, mask=(True,) * graphs.sampling.steps, share=cut["share"])
    return graphs.add({FULL: folder, SHALLOW: folder}, caching=record)


def export_split(source: Path, share: float, cache: Cache, latent: str = "sample") -> Path:
    """The cache's directory with both denoisers and their contracts; they have one file of weights in common. `latent`:
    the input that has it."""

    def make(folder: Path) -> None:
        model = load(source / f"{FULL}.onnx")
        cut = find_cut(model.graph, share, latent)
        feature, after = str(cut.feature.name), place(cut.feature)
        save_sharing(full_model(model, cut.feature), folder / f"{FULL}.onnx")
        saved = load(folder / f"{FULL}.onnx")  # whose weights are places in the file
        shallow = shallow_model(saved, feature)
        save_sharing(shallow, folder / f"{SHALLOW}.onnx")
        for name, each in ((FULL, saved), (SHALLOW, shallow)):
            (folder / f"{name}.json").write_text(contract_of(each).model_dump_json())
        figures = {
            name: {"nodes": len(each.graph), **cost(folder / f"{name}.onnx")}
            for name, each in ((FULL, saved), (SHALLOW, shallow))
        }
        (folder / CUT).write_text(
            json.dumps({"feature": feature, "after": after, "share": cut.share, "engines": figures})
        )

    return cache.get("cut", {"source": source.name, "share": share}, make)


def longest_of(steps: int, full: int) -> int:
    """So many steps without a full one as a good mask would not go beyond."""
    return 2 * math.ceil(steps / full) - 1


def _measure(graphs: Graphs, longest: int, cache: Cache, advance: Advance) -> list[list[float | None]]:
    """See reuse.measure_reuse: through the runtime, with ONNX Runtime in fp32, or from the cache."""
    images = graphs.calibration(IMAGES)

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".caching-", dir=out.parent) as name:
            write_bundle(graphs, PORTABLE, Path(name), cache)
            found = run_isolated(measure_reuse, Path(name), images, longest, advance=advance).result
        (out / MEASURED).write_text(json.dumps(found))

    inputs = {"graphs": graphs.identity, "images": images, "longest": longest}
    found: list[list[float | None]] = json.loads((cache.get("reuse", inputs, make) / MEASURED).read_text())
    return found


def choose(measured: Sequence[Sequence[float | None]], full: int) -> tuple[tuple[bool, ...], float]:
    """As choose_mask, of what reuse.measure_reuse found; RecipeError where there is no mask."""
    errors = np.array([[math.inf if error is None else error for error in row] for row in measured])
    mask, error = choose_mask(errors, full)
    if not mask:
        raise RecipeError(
            f"caching.full_steps = {full}: too few: where guidance begins, both branches have to be evaluated in full",
            expected="more full steps",
            got=full,
        )
    return mask, error


def choose_mask(errors: Errors, full_steps: int) -> tuple[tuple[bool, ...], float]:
    """Which steps are full, the first among them, so that the errors of the others are least in sum; and that sum.

    errors[i, j]: of step j with the features of step i < j; infinite where it cannot have them. Exact, by dynamic
    programming over the last full step. No mask where every one has an infinite error.
    """
    steps = len(errors)
    # reused[i, j]: of all steps between the full ones i and j.
    reused = np.zeros((steps, steps + 1))
    for i in range(steps):
        reused[i, i + 2 :] = np.cumsum(errors[i, i + 1 :])
    best = np.full((full_steps, steps), np.inf)  # [k, i]: of the steps before i, which is the full step number k
    before = np.zeros((full_steps, steps), int)
    best[0, 0] = 0.0
    for k in range(1, full_steps):
        for i in range(k, steps):
            sums = best[k - 1, :i] + reused[:i, i]
            before[k, i] = int(np.argmin(sums))
            best[k, i] = sums[before[k, i]]
    ends = best[-1] + reused[:, steps]
    last, least = int(np.argmin(ends)), float(np.min(ends))
    if not math.isfinite(least):
        return (), least
    mask = [False] * steps
    for k in reversed(range(full_steps)):
        mask[last] = True
        last = before[k, last]
    return tuple(mask), least
