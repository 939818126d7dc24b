"""What a benchmark measured, put together: the document, with notes on what has to be known to read it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slipcast.engines import cpu_threads
from slipcast.sampling.samplers import find_sampler
from slipcast_compiler.bench import figures
from slipcast_compiler.bench.document import (
    DENOISER,
    EVALUATING,
    BenchDocument,
    Cost,
    Extrapolated,
    FirstImage,
    Host,
    Missing,
    Quality,
    Ratios,
    Seconds,
    Settings,
    SideFigures,
    Spread,
    evaluating_s,
)
from slipcast_compiler.bench.measure import Results
from slipcast_compiler.bench.peaks import Peaks
from slipcast_compiler.bench.plan import BUNDLE, REFERENCE, BenchPlan, Options
from slipcast_compiler.bench.process import Drawn
from slipcast_compiler.bench.running import Measured
from slipcast_compiler.host.machine import this_machine, this_processor
from slipcast_compiler.judge.scorer import Scorer

BUSY = 0.25  # load per core, before anything was started, from which figures are not to be trusted


def make_document(
    plan: BenchPlan, results: Results, load_before: float | None, peaks: Peaks | None = None
) -> BenchDocument:
    """Everything that follows from what was measured."""
    manifest = plan.bundle.manifest
    pairs = {name: (results.measured[name], beside) for name, beside in results.beside.items()}
    scorer, no_clip = _scorer(plan)
    qualities = _qualities(plan, results, scorer)
    sides = {name: _side(measured, qualities.get(name)) for name, measured in results.measured.items()}
    compile_s = round(sum(plan.record["stages_s"].values()), 1)
    extrapolated = _extrapolated(plan, sides)
    return BenchDocument(
        name=manifest.name,
        command=command(plan),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        source_sha256=manifest.source_sha256,
        host=Host(**this_machine().model_dump(), load_before=load_before, cpu=this_processor(), peaks=peaks),
        settings=_settings(plan),
        sides=sides,
        ratios={name: _ratios(peer.seconds, bundle.seconds) for name, (peer, bundle) in pairs.items()},
        memory_ratios={name: _ratios(_memory(peer), _memory(bundle)) for name, (peer, bundle) in pairs.items()},
        component_ratios={name: found for name, pair in pairs.items() if (found := _component_ratios(*pair))},
        batch_ratios={name: found for name, pair in pairs.items() if (found := _batch_ratios(*pair))},
        compile_s=compile_s,
        break_even={
            name: figures.break_even(compile_s, sides[name].seconds.median, sides[BUNDLE].seconds.median)
            for name in pairs
        },
        extrapolated=extrapolated,
        missing={name: Missing.model_validate(why) for name, why in plan.missing.items()},
        failed=results.failed,
        quality_reference="diffusers in fp32" if results.reference is not None else None,
        notes=(*_notes(plan, results, load_before, no_clip), *_told(extrapolated)),
    )


def _settings(plan: BenchPlan) -> Settings:
    prompts, seeds = plan.requests(0, plan.options.images)
    return Settings(
        images=plan.options.images,
        batches=plan.options.batches,
        threads=cpu_threads(),
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        image=plan.image,
        sampling=dict(plan.told),
    )


def command(plan: BenchPlan) -> str:
    """What repeats the benchmark; environments of peers are taken to be there."""
    options, default = plan.options, Options()
    words = ["slipcast", "bench", str(plan.path)]
    given: dict[str, tuple[Any, Any]] = {
        "--model": (options.model, default.model),
        "--against": (options.against, default.against),
        "--target": (options.target, default.target),
        "--images": (options.images, default.images),
        "--batch": (options.batches, default.batches),
        "--steps": (options.steps, default.steps),
    }
    for option, (value, usual) in given.items():
        if value != usual:
            words += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _side(measured: Measured, quality: Quality | None) -> SideFigures:
    seconds, side = measured.seconds, measured.side
    throughput = {"1": round(1 / figures.spread(seconds)["median"], 4)}
    for size, drawn in measured.batches.items():
        throughput[str(size)] = round(size / figures.spread(_seconds(drawn))["median"], 4)
    disk = side.disk_bytes + (_size(side.prepared) if side.prepared else 0)
    return SideFigures(
        title=side.title,
        about=measured.about,
        images=len(seconds),
        seconds=Seconds(**_rounded(figures.spread(seconds)), all=tuple(round(s, 4) for s in seconds)),
        images_per_second=throughput,
        first_image_s=FirstImage(cold=round(measured.cold_s, 3), warm=round(measured.warm_up_s[0], 4)),
        load_s=round(measured.load_s, 3),
        warm_up_s=tuple(round(s, 4) for s in measured.warm_up_s),
        prepare_s=None if measured.prepare_s is None else round(measured.prepare_s, 2),
        peak_memory_mb=round(max(_memory(measured)), 1),
        peak_memory_mb_by_batch={str(b): round(max(_peaks(d)), 1) for b, d in measured.batches.items()},
        gpu_memory_mb=max((each for each in measured.gpu_memory_mb if each is not None), default=None),
        disk_mb=round(disk / 1e6, 1),
        components_s=_components(measured),
        cost=Cost.model_validate(side.cost) if side.cost else None,
        energy_j=_energy(measured.joules),
        gpu_energy_j=_energy(measured.gpu_joules),
        quality=quality,
    )


def _energy(joules: Sequence[float | None]) -> Spread | None:
    known = [each for each in joules if each is not None]
    return Spread(**_rounded(figures.spread(known))) if known and len(known) == len(joules) else None


def _components(measured: Measured) -> dict[str, float] | None:
    """Mean seconds per image; `elsewhere` is what is left."""
    parts = [each.components_s for each in measured.drawn]
    first = parts[0]
    if not first:
        return None
    means = {name: sum(part[name] for part in parts if part) / len(parts) for name in first}
    left = sum(measured.seconds) / len(parts) - sum(means.values())
    return _rounded({**means, "elsewhere": max(0.0, left)})


def _component_ratios(peer: Measured, bundle: Measured) -> dict[str, Ratios]:
    """Of the components that both sides tell the time of: other bundles do, peers of other makers do not. Denoisers
    are one, however many take turns in the loop."""
    theirs, ours = ([_joined(drawn.components_s or {}) for drawn in measured.drawn] for measured in (peer, bundle))
    shared = [name for name in ours[0] if name in theirs[0]]
    return {name: _ratios([part[name] for part in theirs], [part[name] for part in ours]) for name in shared}


def _joined(parts: Mapping[str, float]) -> dict[str, float]:
    others = {name: seconds for name, seconds in parts.items() if not EVALUATING.fullmatch(name)}
    return others | ({DENOISER: evaluating_s(parts)} if len(others) < len(parts) else {})


def _batch_ratios(peer: Measured, bundle: Measured) -> dict[str, Ratios]:
    return {str(size): _ratios(_seconds(of), _seconds(bundle.batches[size])) for size, of in peer.batches.items()}


def _extrapolated(plan: BenchPlan, sides: Mapping[str, SideFigures]) -> dict[str, Extrapolated]:
    """What DDPM's 1000 evaluations would take where that is too long to run: from the time of each in `diffusers`."""
    reference = sides.get(REFERENCE)
    if "ddpm1000" in sides or not (reference and reference.components_s and plan.sampling):
        return {}
    sampling, denoising = plan.sampling, reference.components_s["denoiser"]
    # PNDM evaluates its second level twice.
    evaluations = sampling.steps * find_sampler(sampling.sampler).evaluations + (sampling.sampler == "pndm")
    seconds = reference.seconds.median + denoising * (1000 / evaluations - 1)
    ratio = seconds / sides[BUNDLE].seconds.median
    return {"ddpm1000": Extrapolated(seconds=round(seconds, 1), ratio=round(ratio, 1), evaluations=evaluations)}


def _told(extrapolated: Mapping[str, Extrapolated]) -> list[str]:
    return [
        f"{name}, not run, would take {found.seconds:.0f} s an image, {found.ratio:.0f} times the bundle's: "
        f"extrapolated from the {found.evaluations} evaluations of {REFERENCE}"
        for name, found in extrapolated.items()
    ]


def _qualities(plan: BenchPlan, results: Results, scorer: Scorer | None) -> dict[str, Quality]:
    reference = results.reference
    if reference is None:
        return {}
    prompts, _ = plan.requests(0, plan.options.images)
    before = scorer(reference, prompts) if scorer else None
    found = {}
    for name, measured in results.measured.items():
        images = measured.images[: plan.options.images]  # a bundle that had several rounds drew them again
        scores = (before, scorer(images, prompts[: len(images)])) if scorer and before is not None else None
        values = figures.quality(reference, images, scores, pixels=measured.side.pixels)
        rounded = {metric: value and _rounded(value, 5) for metric, value in values.items()}
        found[name] = Quality.model_validate(rounded)
    return found


def _scorer(plan: BenchPlan) -> tuple[Scorer | None, str | None]:
    """The recipe's scorer, where its directory is found beside the checkpoint or here; a hub id is not downloaded."""
    path = plan.record["recipe"].get("evaluate", {}).get("scorer")
    if plan.reference is None or not path:
        return None, None
    folders = [Path(".")]
    if plan.checkpoint and str(plan.checkpoint.root).endswith("/" + plan.bundle.manifest.base_model):
        folders.insert(0, Path(str(plan.checkpoint.root).removesuffix("/" + plan.bundle.manifest.base_model)))
    for folder in folders:
        if (folder / path).is_dir():
            return Scorer(path, folder.resolve()), None
    return None, f"CLIP was not run: the recipe's scorer {path} is not here"


def _notes(plan: BenchPlan, results: Results, load_before: float | None, no_clip: str | None) -> list[str]:
    notes = []
    if load_before is not None and load_before > BUSY * cpu_threads():
        notes.append(f"the machine was busy (load {load_before} on {cpu_threads()} cores): repeat it on a quiet one")
    for name, measured in results.measured.items():
        few = len(measured.drawn)
        if measured.side.images is not None:
            notes.append(f"{name} ran on {few} of {plan.options.images} images")
        if not measured.side.batches and max(plan.options.batches) > 1:
            notes.append(f"{name} ran one image at a time only")
        if not measured.side.pixels and results.reference is not None:
            notes.append(f"{name} takes another way to the picture: PSNR and SSIM would mean nothing and are not run")
        if measured.about.get("bf16_is_native") is False:
            notes.append(f"{name}: this processor has no bf16 instructions, so OpenVINO computed in fp32 instead")
        if measured.side.job.get("compile"):
            notes.append(f"{name}: the memory of torch's compile processes is not in its peak")
    if results.no_reference:
        notes.append(f"quality was not measured: {results.no_reference}")
    if no_clip:
        notes.append(no_clip)
    if results.apart:
        notes.append(f"every peer ran in turn with the bundle alone: {results.apart}")
    if all(drawn.joules[0] is None for drawn in results.measured.values()):
        notes.append("energy of the processor was not measured: this host does not let RAPL be read")
    if not results.gpus:
        notes.append("GPU memory and energy were not measured: no NVIDIA GPU, or nvidia-ml-py is not installed")
    notes.append("compile_s is the sum of the report's stages; those that came from the cache took longer once")
    return notes


def _ratios(peer: list[float], bundle: list[float]) -> Ratios:
    return Ratios.model_validate(_rounded(figures.ratios(peer, bundle)))


def _memory(measured: Measured) -> list[float]:
    return _peaks(measured.drawn)


def _peaks(drawn: Sequence[Drawn]) -> list[float]:
    return [each.peak_memory_mb for each in drawn]


def _seconds(drawn: Sequence[Drawn]) -> list[float]:
    return [each.seconds for each in drawn]


def _rounded(values: dict[str, float], digits: int = 4) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
