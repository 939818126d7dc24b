"""Nodes that stay in fp32 where the rest of a graph is cast to fp16 or bf16, found by measuring.

What every component reads is recorded while calibration prompts are drawn. On that, its graph is compared with
itself rounded as the cast rounds it. Where an output is further off than the target allows, the nodes that do most
damage are looked for, as layers are for INT8 (passes/sensitivity.py): those that overflow, as decoders of published
checkpoints do in fp16, and those whose rounding the rest makes larger, such as the angles of a timestep's embedding.

What rounding costs where no node stands out, as a relative L2 norm of the worst output (unit roundoff: fp16 0.0005,
bf16 0.004); the reference model, and the denoiser of Stable Diffusion 1.5's shapes with random weights:

                          fp16    bf16
    text_encoder          0.0005  0.004
    vae_decoder           0.0003  0.003
    denoiser              0.0005  0.005
    denoiser, 1.5-shaped  0.0015  0.014   (with its angles rounded: 0.0066 and 0.043)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import SHALLOW, Target
from slipcast.bundle.reader import open_any_bundle
from slipcast.engines import open_engine, refusal
from slipcast.progress import Advance, Stages
from slipcast_compiler.engines import Source
from slipcast_compiler.engines.needs import need_graph_libraries
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.precision.sensitivity import RANKED, search
from slipcast_compiler.recipe.targets import TargetTable

logger = logging.getLogger("slipcast")

Arrays = dict[str, npt.NDArray[Any]]
Found = dict[str, dict[str, Any]]  # by component: see search_graph

MAX_ERROR = {"fp16": 0.004, "bf16": 0.03}  # where the target does not say: about eight times the unit roundoff
IMAGES, SAMPLES = 2, 4  # drawn, and evaluations of each component, where there are as many
MEASUREMENTS = 200  # choices of nodes that are tried
WORST = 1e3  # the error of what is not finite
FOUND = "found.json"


def measure_cast(
    table: TargetTable, sources: Mapping[str, Source], inputs: Path, cache: Cache, advance: Advance
) -> Found:
    """What stays in fp32 of each component of a target in half precision, from the cache or measured.

    `inputs`: what components read and give in fp32, NAME/0000.npz and so on (see recording.py), in a directory that is
    named by a hash of all that they came from.
    """
    need_graph_libraries()
    half = table.half
    assert half
    limit = table.max_cast_error or MAX_ERROR[half]

    def make(out: Path) -> None:
        models = {name: source.model for name, source in sources.items()}
        found = run_isolated(search_graphs, models, inputs, half, limit, advance=advance).result
        (out / FOUND).write_text(json.dumps(found, allow_nan=False))

    identities = {name: source.identity for name, source in sources.items()}
    entry = cache.get(
        "mixed-precision", {"sources": identities, "precision": half, "limit": limit, "inputs": inputs.name}, make
    )
    found: Found = json.loads((entry / FOUND).read_text())
    for name, of in found.items():
        if of["fp32"]:
            logger.info(
                "%s in %s: %d of %d nodes stay in fp32, error %.2g in place of %.2g", name, half, of["kept"],
                of["nodes"], of["error"], of["error_all"],
            )  # fmt: skip
    return found


def check_cast(
    folder: Path, target: Target, quantized: Collection[str], found: Found, inputs: Path, stages: Stages
) -> None:
    """Note in `found`, as `engine_error`, how far the engines of a target in the bundle at `folder` are off that have
    nodes in fp32, if they can run here; with a warning where that is more than was allowed. Those that are
    `quantized` have a check of their own.

    For an engine may fuse what is in fp32 with what is not: OpenVINO 2026.4 forgets it of linear layers with a bias,
    and of attention.
    """
    kept = tuple(name for name, of in found.items() if of["fp32"] and name not in quantized)
    if not kept or refusal(target):
        return
    with stages.stage(f"check {target.id}") as advance:
        errors = run_isolated(engine_errors, folder, target, kept, inputs, advance=advance).result
    for name, error in errors.items():
        found[name]["engine_error"], limit = error, found[name]["limit"]
        if error > limit:
            logger.warning(
                "%s on %s is %.2g off, more than %.2g: the engine rounds what was to stay in fp32. Choose fp32, or a "
                "larger max_cast_error", name, target.id, error, limit,
            )  # fmt: skip


def engine_errors(
    folder: Path, target: Target, components: tuple[str, ...], inputs: Path, advance: Advance
) -> dict[str, float]:
    """By component, worst_error of the target's engine against what was recorded."""
    contracts, errors = open_any_bundle(folder).manifest.components, dict[str, float]()
    for done, component in enumerate(components):
        advance(done, len(components))
        recorded = _read(inputs, component)
        files = target.components[component]
        weights = folder / files.weights if files.weights else None
        with open_engine(target.engine, folder / files.model, weights, target.precision, contracts[component]) as run:
            found = [run({spec.name: arrays[spec.name] for spec in run.inputs}) for arrays in recorded]
        errors[component] = worst_error(recorded, found)
    return errors


def search_graphs(
    models: Mapping[str, Path], inputs: Path, precision: str, limit: float, advance: Advance
) -> dict[str, dict[str, Any]]:
    """search_graph of each, by name."""
    from slipcast_compiler.graph.casting import castable

    found = {}
    for done, (name, model) in enumerate(models.items()):
        advance(done, len(models))
        found[name] = search_graph(model, _read(inputs, name), precision, limit)
    if SHALLOW in found:  # which has nodes of the full one, and its weights from the same file
        both = found["denoiser"]["fp32"] | found[SHALLOW]["fp32"]
        for name in ("denoiser", SHALLOW):
            found[name] |= {"fp32": both, "kept": len(both.keys() & castable(models[name]).keys())}
    return found


def search_graph(model: Path, recorded: list[Arrays], precision: str, limit: float) -> dict[str, Any]:
    """The nodes of a graph that have to stay in fp32 for `limit` to hold; plain JSON. `recorded`: what it reads and
    gives in fp32.

    `fp32`: their operators by name, and `kept`: their number. `nodes`: how many a cast would change. `error` and
    `error_all`: of the worst output, as a relative L2 norm, with them in fp32 and with none.
    """
    from slipcast_compiler.graph import qdq
    from slipcast_compiler.graph.casting import castable, rounded_graph

    nodes, ranked_by = castable(model), recorded

    def error(chosen: frozenset[str], count: int) -> float:
        nonlocal ranked_by
        run = qdq.session(rounded_graph(model, precision, nodes.keys() - chosen), model.parent, mapped=True)
        if count == RANKED:  # by those that are furthest off: what overflows may do so in one alone
            return worst_error(ranked_by, [run(arrays) for arrays in ranked_by])
        given = [run(arrays) for arrays in recorded]
        each = [worst_error([wanted], [found]) for wanted, found in zip(recorded, given, strict=True)]
        ranked_by = [recorded[i] for i in np.argsort(each)[::-1][: len(recorded) // 2 or 1]]
        return worst_error(recorded, given)

    found = search(list(nodes), error, limit, MEASUREMENTS, lambda done, total: None)
    kept = {name: kind for name, kind in nodes.items() if name not in found.quantised}
    return {
        "nodes": len(nodes), "kept": len(kept), "fp32": kept,
        "error": found.error, "error_all": found.error_all, "limit": limit, "tried": len(found.tried),
    }  # fmt: skip


def _read(inputs: Path, component: str) -> list[Arrays]:
    files = sorted((inputs / component).glob("*.npz"))
    places = np.linspace(0, len(files) - 1, min(SAMPLES, len(files))).round().astype(int)
    return [dict(np.load(files[place])) for place in places]


def worst_error(wanted: list[Arrays], found: list[Arrays]) -> float:
    """The relative L2 error of the output that is furthest off, over all evaluations; at most WORST."""
    errors = []
    for name in found[0]:
        pairs = [(a[name].astype(np.float64), b[name].astype(np.float64)) for a, b in zip(wanted, found, strict=True)]
        with np.errstate(invalid="ignore"):  # infinity less infinity
            off = sum(float(np.square(a - b).sum()) for a, b in pairs)
        norm = sum(float(np.square(a).sum()) for a, _ in pairs)
        errors.append(np.sqrt(off / norm) if norm and np.isfinite(off) else WORST * (off != 0))
    return float(min(max(errors), WORST))
