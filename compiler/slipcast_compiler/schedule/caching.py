"""[caching]: the shallow denoiser beside the full one, and the steps that it is good for, measured on the family.

The mask is chosen by dynamic programming on the error of every reuse: what a step gives with the features of each step
before it, against what it gives with its own, on the trajectories of calibration prompts.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slipcast.bundle.manifest import Caching, Component
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast_compiler.engines.portable import write_portable
from slipcast_compiler.export.component import contract_of
from slipcast_compiler.graph.cost import cost
from slipcast_compiler.graph.shallow import find_cut, full_model, place, shallow_model
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.plan import Plan
from slipcast_compiler.schedule.reuse import measure_reuse

Errors = npt.NDArray[np.float64]

IMAGES = 8  # trajectories that are measured
FULL, SHALLOW = "denoiser", "denoiser_shallow"
CUT, MEASURED = "cut.json", "reuse.json"


@dataclass(frozen=True)
class Cached:
    """`exported`: all components, with the two denoisers; `record`: the manifest's; `report`: plain JSON."""

    exported: dict[str, Path]
    record: Caching
    report: dict[str, Any]


def cache_features(
    plan: Plan, exported: dict[str, Path], prompts: Path | None, cache: Cache, advance: Advance
) -> Cached:
    """Cut the exported denoiser as the recipe's [caching] asks, and choose its mask. `prompts`: see package.py."""
    both, everything = cut_for_caching(plan, exported, cache)
    cut = json.loads((both[FULL] / CUT).read_text())
    steps, full = plan.sampling.steps, plan.full_steps
    longest = 2 * math.ceil(steps / full) - 1  # without a full step: what a good mask would not go beyond
    measured = _measure(plan, exported[FULL], both, everything, prompts, longest, cache, advance)
    mask, error = choose_mask(measured, full)
    if not mask:
        raise RecipeError(
            f"caching.full_steps = {full}: too few: where guidance begins, both branches have to be evaluated in full",
            expected="more full steps", got=full,
        )  # fmt: skip
    report = {**cut, "mask": list(mask), "full_steps": full, "error": error, "images": IMAGES}
    return Cached(both, everything.model_copy(update={"mask": mask}), report)


def cut_for_caching(plan: Plan, exported: dict[str, Path], cache: Cache) -> tuple[dict[str, Path], Caching]:
    """`exported` with the full and the shallow denoiser, and the manifest's record with all steps in full."""
    table = plan.recipe.caching
    assert table
    folder = cached_cut(exported[FULL], table.share, cache)
    cut = json.loads((folder / CUT).read_text())
    contract = Component.model_validate_json((folder / f"{SHALLOW}.json").read_text())
    features = tuple(spec for spec in contract.inputs if spec.name == cut["feature"])
    record = Caching(features=features, mask=(True,) * plan.sampling.steps, share=cut["share"])
    return {**exported, FULL: folder, SHALLOW: folder}, record


def cached_cut(source: Path, share: float, cache: Cache) -> Path:
    """The cache's directory with both denoisers and their contracts; they have one file of weights in common."""

    def make(folder: Path) -> None:
        model = ir.load(source / f"{FULL}.onnx")
        cut = find_cut(model.graph, share)
        feature, after = str(cut.feature.name), place(cut.feature)
        ir.save(full_model(model, cut.feature), folder / f"{FULL}.onnx", external_data=f"{FULL}.onnx.data")
        saved = ir.load(folder / f"{FULL}.onnx")  # whose weights are places in the file
        shallow = shallow_model(saved, feature)
        ir.save(shallow, folder / f"{SHALLOW}.onnx")
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


def _measure(
    plan: Plan,
    staged: Path,
    both: dict[str, Path],
    record: Caching,
    prompts: Path | None,
    longest: int,
    cache: Cache,
    advance: Advance,
) -> Errors:
    """See reuse.measure_reuse: through the runtime, with ONNX Runtime in fp32, or from the cache."""
    texts = plan.family.calibration if plan.family else (None,)
    chosen = tuple(texts[i % len(texts)] for i in range(IMAGES))

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".caching-", dir=out.parent) as name:
            write_portable(plan, both, prompts, Path(name), cache, staged, record)
            found = run_isolated(measure_reuse, Path(name), chosen, longest, advance=advance).result
        (out / MEASURED).write_text(json.dumps(found))

    inputs = {
        "exported": {component: source.name for component, source in both.items()}, "prompts": chosen,
        "table": prompts and prompts.parent.name, "sampling": plan.sampling.model_dump(mode="json"), "longest": longest,
    }  # fmt: skip
    found = json.loads((cache.get("reuse", inputs, make) / MEASURED).read_text())
    return np.array([[math.inf if error is None else error for error in row] for row in found])


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
