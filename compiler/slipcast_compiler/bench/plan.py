"""What a benchmark will do, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipcast.bundle.evidence import REPORT, report_files
from slipcast.bundle.manifest import Sampling
from slipcast.bundle.reader import Bundle, ProgramBundle, open_bundle
from slipcast.bundle.validation import parse_json
from slipcast.engines import cpu_threads, cuda
from slipcast.engines.targets import choose_target
from slipcast.errors import ArtifactError, HostError, RequestError
from slipcast_compiler.bench.peers import PEERS, Peer, how_to_install, interpreter
from slipcast_compiler.bench.venvs import VENVS
from slipcast_compiler.model import original
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.recipe.recipe import EvaluateTable

BUNDLE = "bundle"  # the name of the side that all others are divided by
REFERENCE = "diffusers"  # the side whose pictures are the original's


@dataclass(frozen=True)
class Side:
    """`images` at most are made (None: as many as of the others); `prepared` is where its export lies, `disk_bytes`
    what it needs of the disk besides that. `cost`: what a bundle's denoiser costs on paper, as its report has it."""

    name: str
    title: str
    interpreter: str
    job: dict[str, Any]
    images: int | None = None
    batches: bool = True
    pixels: bool = True
    prepared: Path | None = None
    disk_bytes: int = 0
    cost: dict[str, int] | None = None


@dataclass(frozen=True)
class Options:
    """The command's options; `folder` is where environments and exports of peers are kept."""

    against: tuple[str, ...] = ()
    model: Path | None = None
    target: str = "auto"
    images: int = 8
    batches: tuple[int, ...] = (1,)
    steps: int | None = None
    folder: Path = Path("artifacts")


@dataclass(frozen=True)
class BenchPlan:
    """`path`: as the bundle was named, which is `sides[0]`. `reference` draws the original's pictures where no side
    does, and is not measured; None, with `no_quality` saying why, where that cannot be. `missing`: peer -> reason and
    install command. `sampling`: None of a captured pipeline; `told`: what is said of it; `image`: the size."""

    path: Path
    bundle: Bundle | ProgramBundle
    record: dict[str, Any]
    options: Options
    sampling: Sampling | None
    sides: tuple[Side, ...]
    missing: dict[str, dict[str, str | None]]
    checkpoint: Checkpoint | None
    reference: Side | None
    no_quality: str | None
    prompts: tuple[str | None, ...] = field(repr=False)
    image: str
    told: Mapping[str, Any]

    def requests(self, start: int, count: int) -> tuple[list[str | None], list[int]]:
        """Prompts and seeds of images start to start + count: held-out prompts, again with new seeds after the last."""
        places = range(start, start + count)
        first = self.record["recipe"].get("evaluate", {}).get("seed", EvaluateTable().seed)
        return [self.prompts[i % len(self.prompts)] for i in places], [first + i for i in places]


def make_plan(path: Path, options: Options) -> BenchPlan:
    """Resolve everything. RequestError for what does not fit together, HostError where every peer is missing."""
    bundle, record = _open(path)
    manifest = bundle.manifest
    manifest.sampling.lay(options.steps)  # refuses steps that the bundle cannot take
    usual = manifest.reference or manifest.sampling  # of the peers: what the bundle was judged against
    sampling = usual.model_copy(update={"steps": options.steps} if options.steps else {})
    check_names(options.against)
    target = choose_target(manifest, options.target).id
    missing = _missing(options, sampling, manifest.takes_prompt)
    if options.against and len(missing) == len(options.against):
        lines = [f"  {name}: {why['reason']}; {why['install']}" for name, why in missing.items()]
        raise HostError("every peer asked for is missing:\n" + "\n".join(lines), hint="install one of them")
    present = [name for name in options.against if name not in missing]
    from_checkpoint = [name for name in present if name in PEERS]
    checkpoint = _checkpoint(bundle, options.model, needed=bool(from_checkpoint))
    sides = [_bundle_side(BUNDLE, f"this bundle on {target}", bundle, record, target, options.steps)]
    for name in present:
        if name in PEERS:
            assert checkpoint
            sides.append(_peer_side(name, PEERS[name], bundle, checkpoint, sampling, options))
        else:
            sides.append(_other_bundle(name, bundle, options))
    reference, why = _reference(sides, bundle, checkpoint, sampling, options)
    prompts = tuple(record["family"]["held_out_prompts"]) if manifest.family else (None,)
    told = sampling.model_dump(mode="json", exclude={"noise"}, exclude_none=True)
    return BenchPlan(
        path, bundle, record, options, sampling, tuple(sides), missing, checkpoint, reference, why, prompts,
        f"{manifest.image.width}x{manifest.image.height}", told,
    )  # fmt: skip


def _open(path: Path) -> tuple[Bundle, dict[str, Any]]:
    bundle = open_bundle(path, files=report_files)
    return bundle, read_report(path, bundle)


def read_report(path: Path, bundle: Bundle | ProgramBundle) -> dict[str, Any]:
    """What a bundle's report.json holds; ArtifactError where it has none."""
    try:
        record = parse_json(bundle.path(REPORT).read_bytes(), REPORT)
    except ArtifactError as error:
        raise ArtifactError(
            f"{path}: holds no report, which has the prompts to measure with", hint="compile the bundle again"
        ) from error
    assert isinstance(record, dict)
    return record


def check_names(against: Sequence[str]) -> None:
    """RequestError, with the candidates, for what is neither a peer nor a directory."""
    for name in against:
        if name not in PEERS and not Path(name).is_dir():
            known = ", ".join(PEERS)
            raise RequestError(f"unknown peer {name!r}", expected=f"{known}, or the path of a bundle", got=name)


def _missing(options: Options, sampling: Sampling, text: bool) -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = {}
    for name in options.against:
        if name not in PEERS:
            continue
        peer = PEERS[name]
        if interpreter(peer, venvs(options)) is None:
            needs = " and ".join([*peer.needs, *(["a C++ compiler"] if peer.programs else [])])
            found[name] = {"reason": f"needs {needs}", "install": how_to_install(name)}
        elif peer.gpu and (problem := cuda.look().problem):
            found[name] = {"reason": f"needs a GPU: {problem}", "install": how_to_install(name)}
        elif (peer.venv or peer.gpu) and not text:
            found[name] = {"reason": "has no pipeline for models without text", "install": None}
        elif (peer.venv or peer.gpu) and not original.has_scheduler(sampling):
            asked = f"{sampling.sampler} with schedule {sampling.schedule or 'as listed'}"
            found[name] = {"reason": f"diffusers has no scheduler for {asked}", "install": None}
    return found


def venvs(options: Options) -> Path:
    """Where the environments of peers are."""
    return options.folder / "bench-venvs"


def wanted_venvs(options: Options) -> list[str]:
    """Names of the environments that the peers asked for have of their own."""
    names = [PEERS[name].venv for name in options.against if name in PEERS]
    return list(dict.fromkeys(name for name in names if name))


def _checkpoint(bundle: Bundle, model: Path | None, *, needed: bool) -> Checkpoint | None:
    """The bundle's own checkpoint, or an error that says how to name it."""
    manifest = bundle.manifest
    root = model or Path(manifest.base_model)
    if not root.is_dir():
        if model or needed:
            raise RequestError(
                "the peers need the checkpoint that the bundle was compiled from",
                expected=f"the directory of {manifest.base_model}",
                got=f"{root}, which is not here",
                hint="name it with --model DIR",
            )
        return None
    checkpoint = Checkpoint(root.resolve(), str(root))
    if checkpoint.sha256 != manifest.source_sha256:
        raise ArtifactError(
            f"{root}: not the checkpoint that the bundle was compiled from",
            expected=f"sha256 {manifest.source_sha256}",
            got=checkpoint.sha256,
            hint="name the right one with --model DIR",
        )
    return checkpoint


def _bundle_side(name: str, title: str, bundle: Bundle, record: dict[str, Any], target: str, steps: int | None) -> Side:
    job = {"side": "bundle.py", "bundle": str(bundle.root), "target": target, "steps": steps}
    return Side(name, title, sys.executable, job, disk_bytes=bytes_to_run(bundle, target), cost=record.get("cost"))


def bytes_to_run(bundle: Bundle | ProgramBundle, target: str) -> int:
    """Manifest, tokenizers, tables and one target's engines: what a host needs of the bundle."""
    manifest = bundle.manifest
    engines = next(t for t in manifest.targets if t.id == target).components.values()
    names = [*manifest.shared_files, *(f for e in engines for f in (e.model, e.weights) if f)]
    return (bundle.root / "manifest.json").stat().st_size + sum(bundle.entry(name).size for name in set(names))


def _other_bundle(name: str, bundle: Bundle, options: Options) -> Side:
    other, record = _open(Path(name))
    mine, theirs = bundle.manifest.image, other.manifest.image
    prompted = bundle.manifest.takes_prompt
    if (mine.width, mine.height) != (theirs.width, theirs.height) or other.manifest.takes_prompt != prompted:
        raise RequestError(
            f"{name}: makes other pictures",
            expected=f"{mine.width}x{mine.height}",
            got=f"{theirs.width}x{theirs.height}",
        )
    other.manifest.sampling.lay(options.steps)
    target = choose_target(other.manifest).id
    return _bundle_side(name, f"bundle {other.manifest.name} on {target}", other, record, target, options.steps)


def _peer_side(
    name: str, peer: Peer, bundle: Bundle, checkpoint: Checkpoint, sampling: Sampling, options: Options
) -> Side:
    image = bundle.manifest.image
    if peer.sampling:
        sampling = sampling.model_copy(update=dict(peer.sampling))
    scheduler = original.scheduler_for(sampling)
    job = {
        "side": peer.side,
        "model": str(checkpoint.root),
        "sampling": sampling.model_dump(mode="json"),
        "size": [image.width, image.height],
        "threads": cpu_threads(),
        "scheduler": scheduler,
        "latent": [image.channels, image.height // image.factor, image.width // image.factor],
        "pipeline": checkpoint.index["_class_name"],
        **peer.options,
    }
    python = interpreter(peer, venvs(options))
    assert python
    prepared, disk = None, sum(file.stat().st_size for file in checkpoint.files)
    if peer.venv:
        key = json.dumps([checkpoint.sha256, peer.side, VENVS[peer.venv].record, python == sys.executable])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        prepared, disk = options.folder.absolute() / "bench-exports" / f"{Path(peer.side).stem}-{digest}", 0
        job["prepared"] = str(prepared / "model")
    return Side(name, peer.title, python, job, peer.images, peer.batches, peer.pixels, prepared, disk)


def _reference(
    sides: Sequence[Side], bundle: Bundle, checkpoint: Checkpoint | None, sampling: Sampling, options: Options
) -> tuple[Side | None, str | None]:
    """Who draws the original's pictures: a side that is measured anyway, or one that only draws."""
    found = next((side for side in sides if side.name == REFERENCE), None)
    if found:
        return found, None
    if not options.against and not options.model:
        return None, "no peer was asked for: nothing to compare pictures with"
    if interpreter(PEERS[REFERENCE], venvs(options)) is None:
        return None, f"the original needs diffusers: {how_to_install(REFERENCE)}"
    if checkpoint is None:
        return None, "the original's pictures need the checkpoint: name it with --model DIR"
    return _peer_side(REFERENCE, PEERS[REFERENCE], bundle, checkpoint, sampling, options), None
