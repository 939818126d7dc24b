"""Add a target to a published bundle, on another machine: from the bundle's own ONNX, without torch or the checkpoint.

The original is not there to judge by. What can run here is compared with the target that it was built from, whose own
distance to the original the bundle knows; what cannot is added as it is, and said to be.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.evidence import calibration_prompts, held_out_prompts
from slipcast.bundle.manifest import SCHEMA_VERSION, Addition, EngineFiles, Manifest, Target
from slipcast.bundle.program import NUMBERS
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import Bundle, ProgramBundle, check_digests, open_any_bundle
from slipcast.bundle.records import BaseManifest
from slipcast.bundle.sources import ImageSource
from slipcast.engines import ENGINES, refusal
from slipcast.errors import CheckFailed, HostError, RecipeError, ResourceError
from slipcast.progress import Advance, Stages
from slipcast_compiler.engines import Source, Sources, build_target, declare, tensorrt
from slipcast_compiler.engines.needs import need_graph_libraries
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.engines.recording import record, record_program
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.files import link
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.metrics import psnr
from slipcast_compiler.precision.mixed import IMAGES, SAMPLES, Found, check_cast, measure_cast
from slipcast_compiler.recipe.seeds import CALIBRATION, GATE
from slipcast_compiler.recipe.targets import QUANTIZED, TargetTable, check_one_image

logger = logging.getLogger("slipcast")

WHOLE = ".whole"  # within the workspace
PORTABLE = "onnxruntime"  # the engine whose files are the graphs themselves
# dB on the worst picture. Rounding stays above it (the reference model: bf16 at 48, INT8 at 37), and an engine that
# reads its graph wrongly does not.
LEAST_PSNR = 20.0
AnyBundle = Bundle | ProgramBundle


@dataclass(frozen=True)
class Added:
    """The published bundle and its new target; `not_run`: why it could not be compared with anything here."""

    output: Path
    manifest: BaseManifest
    target: Target
    not_run: str | None


def add_target(
    path: Path, table: TargetTable, output: Path, cache: Cache, stages: Stages, images: int = 4, replace: bool = False
) -> Added:
    """Publish the bundle at `path` with one target more at `output`, which may be the same place.

    Either the new bundle is there, complete, or nothing has changed. `images`: pictures to compare. `replace`: a target
    of this name that is there already. (Both are options of the command: with them it has seven parameters.) Raises
    RecipeError where the bundle has no graph to build from, HostError where the engine cannot be built here, and
    CheckFailed where the pictures are far from those of the target it comes from.
    """
    if not ENGINES[table.engine].can_build():
        raise HostError(f"target {table.engine} cannot be built here", hint=ENGINES[table.engine].why_not())
    need_graph_libraries()
    with publish.workspace(output) as folder:  # before the bundle is opened: who waited here goes on from its new state
        bundle = open_any_bundle(path)
        _check_version(bundle.manifest)
        _check_kind(bundle.manifest, table)
        portable, sizes = find_portable(bundle.manifest, table.precision), _sizes(bundle.manifest)
        _check_new(bundle.manifest, declare(table, portable.components, sizes), portable, replace)
        _check_space(bundle, portable, output)
        with stages.stage("verify") as advance:
            check_digests(bundle, "all", advance)
        digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
        pool = Pool(folder)
        for target in bundle.manifest.targets:
            for files in target.components.values():
                pool.know(files, digests)
        with stages.stage("copy"):
            _copy(bundle, [entry.path for entry in bundle.manifest.files], folder)
        sources, casts = _sources(bundle, portable, digests, folder), Found()
        if table.half:
            exact, measured = _measured(bundle, portable, digests, folder)
            with stages.stage("record inputs") as advance:
                inputs = _inputs(bundle, exact, measured, cache, advance)
            with stages.stage("measure casts") as advance:
                casts = measure_cast(table, measured, inputs, cache, advance)
        with stages.stage(f"build {table.name}") as advance:
            quantized = _quantized(bundle, portable) if table.precision in QUANTIZED else {}
            made_from = Sources(sources, sizes, quantized, _exact(bundle.manifest))
            stand_ins = {name: casts[plain] for plain, name in _stand_ins(bundle.manifest).items() if plain in casts}
            target = build_target(table, made_from, pool, cache, advance, {**casts, **stand_ins})
        fields = _fields(bundle.manifest, target)
        _remove_unused(folder, bundle.manifest, fields["targets"])
        write = publish.write_manifest if isinstance(bundle, Bundle) else publish.write_program_manifest
        write(folder, fields)
        if casts:
            check_cast(folder, target, quantized, casts, inputs, stages)
        if not_run := refusal(target):
            logger.warning("%s was not run here and is compared with nothing: %s", target.id, not_run)
        else:
            target = target.model_copy(update={"addition": _compare(folder, bundle, target, portable, images, stages)})
            fields["targets"] = tuple(target if each.id == target.id else each for each in fields["targets"])
        with stages.stage("publish"):
            manifest = write(folder, fields)
            publish.publish(folder, output)
    return Added(output, manifest, target, not_run)


def _measured(
    bundle: AnyBundle, portable: Target, digests: dict[str, str], folder: Path
) -> tuple[Target, dict[str, Source]]:
    """The target in fp32 whose graphs a cast is measured on, also that of what is quantised (see casts.py); of a bundle
    that has none, all that is not. Without those that are exact, and those that take others' places at times, whose
    nodes they have."""
    left = {*_exact(bundle.manifest), *_stand_ins(bundle.manifest).values()}
    for target in bundle.manifest.targets:
        if (target.engine, target.precision) == (PORTABLE, "fp32"):
            sources = _sources(bundle, target, digests, folder)
            return target, {name: source for name, source in sources.items() if name not in left}
    logger.warning(
        "%s has no target in fp32, on which casts of what is quantised could be measured", bundle.manifest.name
    )
    sources, quantized = _sources(bundle, portable, digests, folder), _quantized(bundle, portable)
    return portable, {name: source for name, source in sources.items() if name not in left | quantized.keys()}


def _inputs(bundle: AnyBundle, target: Target, components: Collection[str], cache: Cache, advance: Advance) -> Path:
    """What the target's components read and give; see mixed_precision.measure_cast."""
    prompts: Sequence[str | None] = calibration_prompts(bundle) or [None]
    given = _given(bundle)
    count = max(IMAGES if prompts[0] else 1, len(given))
    images = tuple(zip((prompts[i % len(prompts)] for i in range(count)), CALIBRATION.take(count), strict=True))
    drawn_by = bundle.manifest.model_dump(mode="json", exclude={"targets", "quality", "performance"})

    def make(out: Path) -> None:
        arguments = bundle.root, target.id, tuple(components), images
        if isinstance(bundle, Bundle):
            run_isolated(record, *arguments, SAMPLES, out, advance=advance)
        else:
            run_isolated(record_program, *arguments, given, max(SAMPLES, count), out, advance=advance)

    return cache.get("inputs", {"manifest": drawn_by, "target": target.id, "images": images}, make)


def _sizes(manifest: Manifest | ProgramManifest) -> tensorrt.Sizes:
    if isinstance(manifest, Manifest):
        return manifest.image
    return tensorrt.Lengths(manifest.program, manifest.components)


def _exact(manifest: Manifest | ProgramManifest) -> frozenset[str]:
    return frozenset() if isinstance(manifest, Manifest) else manifest.exact


def _stand_ins(manifest: Manifest | ProgramManifest) -> dict[str, str]:
    """By component, the one that takes its place: while adapters are set, or for strangers."""
    found = {} if isinstance(manifest, Manifest) else manifest.stand_ins
    return {plain: name for each in found.values() for plain, name in each.items()}


def _given(bundle: AnyBundle) -> list[dict[str, Any]]:
    """By variant, what a call takes besides a text: what chooses it, and a pattern for each picture."""
    if isinstance(bundle, Bundle):
        return [{}]
    program, found = bundle.manifest.program, []
    for variant in program.every:
        pictures = {
            name: _pattern(sources[0]) if sources[0].place is None else list(map(_pattern, sources))
            for name, sources in variant.images.items()
        }
        found.append({**pictures, **{name: variant.fixed[name] for name in program.listed}})
    return found


def _pattern(source: ImageSource) -> Any:
    """A picture of slopes, each channel another; of what is no picture, normal numbers. The bundle has no others."""
    if source.size is None:
        return np.random.default_rng(0).standard_normal(source.shape, np.float32)
    channels, height, width = source.size
    down, across = np.linspace(0, 1, height, dtype=np.float32)[:, None], np.linspace(0, 1, width, dtype=np.float32)
    slopes = [np.broadcast_to(each, (height, width)) for each in (across, down, (across + 1 - down) / 2)]
    return np.stack(slopes[:channels])[None]


def _check_kind(manifest: Manifest | ProgramManifest, table: TargetTable) -> None:
    """RecipeError for what a captured pipeline's targets cannot have."""
    if isinstance(manifest, Manifest):
        return
    check_one_image(table)
    if manifest.adapters and not table.takes_adapters:
        raise RecipeError(
            f"{manifest.name} has slots for adapters, and {table.name} can have none",
            expected="a CPU target in fp32, bf16 or int4", got=table.name,
        )  # fmt: skip


def find_portable(manifest: BaseManifest, precision: str) -> Target:
    """The target whose graphs one in `precision` is built from: ONNX, quantised where that is asked for, else in
    fp32."""
    wanted = precision if precision in QUANTIZED else "fp32"
    for target in manifest.targets:
        if (target.engine, target.precision) == (PORTABLE, wanted):
            return target
    raise RecipeError(
        f"{manifest.name} has no portable graphs for a target in {precision}",
        expected=f"a target {PORTABLE} in {wanted}", got=", ".join(target.id for target in manifest.targets),
        hint=f'compile it with [[targets]] engine = "{PORTABLE}", precision = "{wanted}" beside the others',
    )  # fmt: skip


def _quantized(bundle: AnyBundle, portable: Target) -> dict[str, None]:
    """The components of a quantised target that are: their graphs read integers."""
    import onnx

    def reads_integers(files: EngineFiles) -> bool:
        graph = onnx.load(bundle.root / files.model, load_external_data=False).graph
        return any(node.op_type == "DequantizeLinear" for node in graph.node)

    return {name: None for name, files in portable.components.items() if reads_integers(files)}


def _check_version(manifest: BaseManifest) -> None:
    """What a newer version wrote would be lost here: this one reads what it knows, and writes what it read."""
    if tuple(map(int, manifest.schema_version.split("."))) > SCHEMA_VERSION:
        raise HostError(
            f"{manifest.name} was made by a newer slipcast", expected="schema " + ".".join(map(str, SCHEMA_VERSION)),
            got=f"schema {manifest.schema_version}", hint="pip install --upgrade slipcast",
        )  # fmt: skip


def _check_new(manifest: BaseManifest, target: Target, portable: Target, replace: bool) -> None:
    if target.id == portable.id or (not replace and target.id in (each.id for each in manifest.targets)):
        raise RecipeError(
            f"{manifest.name} has a target {target.id} already", expected="another one",
            hint="nothing to do" if target.id == portable.id else "give --replace to build it again",
        )  # fmt: skip


def _check_space(bundle: AnyBundle, portable: Target, output: Path) -> None:
    """ResourceError where a copy of the bundle, and a target as large as its graphs, will not fit."""
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    needed = sum(sizes.values()) + sum(sizes[file] for file in set(portable.files))
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ResourceError(
            f"{output}: the disk is too full", expected=f"about {needed / 1e6:.0f} MB", got=f"{free / 1e6:.0f} MB free",
            hint="the old bundle stays until the new one is complete: free that much, or give -o on another disk",
        )  # fmt: skip


def _sources(bundle: AnyBundle, portable: Target, digests: dict[str, str], folder: Path) -> dict[str, Source]:
    """A target's graphs, with attention as they had it before it was put into slices. `folder`: has a copy."""
    from slipcast_compiler.graph.slices import write_whole

    def model_of(files: EngineFiles) -> Path:
        whole = folder / WHOLE / files.model
        whole.parent.mkdir(parents=True, exist_ok=True)
        if not write_whole(bundle.path(files.model), whole):
            return bundle.path(files.model)
        if files.weights:
            link(folder / files.weights, folder / WHOLE / files.weights)
        return whole

    return {
        str(name): Source(model_of(files), digests[files.model] + (digests[files.weights or files.model]))
        for name, files in portable.components.items()
    }


def _copy(bundle: AnyBundle, paths: Sequence[str], folder: Path) -> None:
    """ArtifactError where a copy is not what was verified: the new manifest will vouch for it."""
    for relative in paths:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path(relative), folder / relative)
    copied = Bundle(folder, bundle.manifest) if isinstance(bundle, Bundle) else ProgramBundle(folder, bundle.manifest)
    check_digests(copied, paths)


def _fields(manifest: BaseManifest, target: Target) -> dict[str, Any]:
    """The manifest's, with the target in its place: a host takes the first that it can run.

    Engines for GPUs, which run nowhere else, come before others, and those for some GPUs before portable ones; so no
    host that the bundle served so far is given another target, unless it has such a GPU.
    """
    targets = list(manifest.targets)
    ids = [each.id for each in targets]
    if target.id in ids:
        targets[ids.index(target.id)] = target
    else:
        before = [_rank(each) <= _rank(target) for each in targets]
        targets.insert(before.index(False) if False in before else len(before), target)
    first = next((each for each in targets if each.quality), targets[0])
    kept = {name: getattr(manifest, name) for name in type(manifest).model_fields if name != "files"}
    early = any(each.early_exit for each in targets)
    requires = tuple(name for name in manifest.requires if name != "early_exit" or early)
    changed = {"targets": tuple(targets), "quality": first.quality, "performance": first.performance}
    return {**kept, **changed, "requires": requires}


def _rank(target: Target) -> int:
    if target.device == "cpu":
        return 2
    return 0 if target.built and target.built.compute_capabilities else 1


def _remove_unused(folder: Path, before: BaseManifest, targets: Sequence[Target]) -> None:
    """What a replaced target alone had, and graphs that were built from."""
    shutil.rmtree(folder / WHOLE)
    used = {file for target in targets for file in target.files}
    for file in {file for target in before.targets for file in target.files} - used:
        (folder / file).unlink()


def _compare(
    folder: Path, bundle: AnyBundle, target: Target, portable: Target, images: int, stages: Stages
) -> Addition:
    """Pictures of held-out prompts on both, with the same noise, each in a process of its own; of every variant one at
    least."""
    prompts: Sequence[str | None] = held_out_prompts(bundle) or [None]
    given = _given(bundle)
    images = max(images, len(given))
    chosen, seeds = [prompts[i % len(prompts)] for i in range(images)], GATE.take(images)
    turns = [slice(place, None, len(given)) for place in range(len(given))]
    jobs = [bundled.Job(chosen[turn], seeds[turn], own) for turn, own in zip(turns, given, strict=True)]
    made, policy = [], portable.performance.residency if portable.performance else "all"
    for each in (portable, target):
        with stages.stage(f"pictures on {each.id}") as advance:
            made.append(run_isolated(bundled.run_program, folder, each.id, policy, jobs, advance=advance).result)
    numbers = isinstance(bundle, ProgramBundle) and bundle.manifest.program.output in NUMBERS
    distances = [
        psnr(one / peak, other / peak)
        for reference, found in zip(*made, strict=True)
        for peak in [np.float32(np.abs(reference["images"]).max() or 1) if numbers else np.float32(1)]
        for one, other in zip(reference["images"], found["images"], strict=True)
    ]
    worst = float(np.min(distances))
    if not worst >= LEAST_PSNR:  # NaN too
        raise CheckFailed(
            f"{target.id} makes other pictures than {portable.id}, whose graphs it has; nothing was published",
            expected=f"at least {LEAST_PSNR:g} dB PSNR on the worst of {images} pictures", got=f"{worst:.1f} dB",
            hint="choose another precision or engine",
        )  # fmt: skip
    return Addition(
        against=portable.id, images=images, psnr_mean=round(float(np.mean(distances)), 3), psnr_worst=round(worst, 3),
        latency_s=_median(made[1]), latency_against_s=_median(made[0]),
    )  # fmt: skip


def _median(made: list[dict[str, Any]]) -> float:
    """Seconds of an image, of the default variant."""
    return round(float(np.median(made[0]["seconds"])), 4)
