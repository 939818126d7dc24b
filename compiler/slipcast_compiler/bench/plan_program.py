"""What a benchmark of a captured pipeline will do: the bundle against the pipeline itself, called as it was captured.

See plan.py, which does the same for other bundles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from slipcast.bundle.evidence import report_files
from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.engines import cpu_threads
from slipcast.engines.targets import choose_target
from slipcast.errors import ArtifactError, HostError, RequestError
from slipcast_compiler.bench.peers import PEERS, how_to_install, interpreter
from slipcast_compiler.bench.plan import (
    BUNDLE,
    REFERENCE,
    BenchPlan,
    Options,
    Side,
    bytes_to_run,
    check_names,
    read_report,
    venvs,
)
from slipcast_compiler.model.digests import digest
from slipcast_compiler.model.links import plainly_named

EAGER = ("diffusers", "diffusers-bf16")  # the peers that can call any pipeline


def plan_program(path: Path, options: Options) -> BenchPlan:
    """Resolve everything; raises as make_plan does."""
    bundle, record = _open(path)
    manifest, program = bundle.manifest, bundle.manifest.program
    check_names(options.against)
    _check_steps(bundle, options.steps)
    missing = _missing(options)
    if options.against and len(missing) == len(options.against):
        lines = [f"  {name}: {why['reason']}" for name, why in missing.items()]
        raise HostError("every peer asked for is missing:\n" + "\n".join(lines), hint=f"{' or '.join(EAGER)} can")
    present = [name for name in options.against if name not in missing]
    asked = bool(set(present) & set(EAGER))
    root = _root(bundle, record, options.model, needed=asked) if asked or options.model else None
    target = choose_target(manifest, options.target).id
    sides = [_bundle_side(BUNDLE, f"this bundle on {target}", bundle, record, target, options.steps)]
    for name in present:
        if name in EAGER:
            assert root
            sides.append(_pipeline_side(name, bundle, record, root, options.steps))
        else:
            sides.append(_other_bundle(name, bundle, options))
    reference = next((side for side in sides if side.name == REFERENCE), None)
    if reference is None and root:
        reference = _pipeline_side(REFERENCE, bundle, record, root, options.steps)
    guidance = program.loop.sampling.guidance_scale if program.loop else program.fixed.get("guidance_scale", "none")
    steps = options.steps or program.usual_steps
    told = {"sampler": program.pipeline, "steps": steps, "guidance_scale": guidance}
    family = record.get("family")
    return BenchPlan(
        path, bundle, record, options, None, tuple(sides), missing, None, reference,
        None if reference else "no peer was asked for: nothing to compare pictures with",
        tuple(family["held_out_prompts"]) if family else (None,), _size(bundle), told,
    )  # fmt: skip


def _open(path: Path) -> tuple[ProgramBundle, dict[str, Any]]:
    bundle = open_any_bundle(path, files=report_files)
    if not isinstance(bundle, ProgramBundle):
        raise RequestError(
            f"{path}: is no bundle of a captured pipeline, as the other is", expected="two of one kind", got=path
        )
    return bundle, read_report(path, bundle)


def _check_steps(bundle: ProgramBundle, steps: int | None) -> None:
    """RequestError where a run of it cannot take so many."""
    program = bundle.manifest.program
    if program.loop and program.loop.steps:
        program.loop.sampling.lay(steps)
    elif steps not in (None, program.usual_steps):
        expected = str(program.usual_steps)
        raise RequestError("--steps: this bundle is measured as it was captured", expected=expected, got=steps)


def _missing(options: Options) -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = {}
    for name in options.against:
        if name in PEERS and name not in EAGER:
            found[name] = {"reason": "does not know captured pipelines", "install": None}
        elif name in PEERS and interpreter(PEERS[name], venvs(options)) is None:
            found[name] = {"reason": f"needs {' and '.join(PEERS[name].needs)}", "install": how_to_install(name)}
    return found


def _size(bundle: ProgramBundle) -> str:
    """Of a picture, or the whole shape of a result."""
    program = bundle.manifest.program
    shape = bundle.manifest.specs(program)[program.results[0]].shape
    return f"{shape[-1]}x{shape[-2]}" if program.output == "image" else " x ".join(map(str, shape[1:]))


def _pipeline(record: dict[str, Any]) -> str | None:
    found: str | None = record["recipe"]["model"].get("pipeline")
    return found


def _root(bundle: ProgramBundle, record: dict[str, Any], model: Path | None, *, needed: bool) -> Path:
    """The model's directory, or an error that says how to name it."""
    manifest, root = bundle.manifest, model or Path(bundle.manifest.base_model)
    if not root.is_dir():
        raise RequestError(
            "the pipeline itself needs the model that the bundle was compiled from",
            expected=f"the directory of {manifest.base_model}",
            got=f"{root}, which is not here",
            hint="name it with --model DIR",
        )
    plain = plainly_named(root.resolve(), record["recipe"]["model"].get("variant"))
    if (found := digest(plain, _pipeline(record))) != manifest.source_sha256:
        raise ArtifactError(
            f"{root}: not the model that the bundle was compiled from",
            expected=f"sha256 {manifest.source_sha256}",
            got=found,
            hint="name the right one with --model DIR",
        )
    return plain


def _bundle_side(
    name: str, title: str, bundle: ProgramBundle, record: dict[str, Any], target: str, steps: int | None
) -> Side:
    program = bundle.manifest.program
    call = record["recipe"]["call"]
    if absent := [name for name in program.images if name not in call]:
        raise RequestError(f"the bundle's recipe gives no {absent[0]} to draw with", expected="a file under [call]")
    pictures = {name: call[name] for name in program.images}
    job = {"side": "bundle.py", "bundle": str(bundle.root), "target": target, "steps": steps, "pictures": pictures}
    return Side(
        name, title, sys.executable, job, pixels=program.output == "image", disk_bytes=bytes_to_run(bundle, target)
    )


def _pipeline_side(name: str, bundle: ProgramBundle, record: dict[str, Any], root: Path, steps: int | None) -> Side:
    peer, program = PEERS[name], bundle.manifest.program
    asked = {program.loop.steps: steps} if steps and program.loop and program.loop.steps else {}
    job = {
        "side": "pipeline.py", "model": str(root), "pipeline": _pipeline(record), "kind": program.output,
        "call": {**record["recipe"]["call"], **asked}, "steps": steps or program.usual_steps, "threads": cpu_threads(),
        **peer.options,
    }  # fmt: skip
    disk = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    return Side(name, peer.title, sys.executable, job, pixels=program.output == "image", disk_bytes=disk)


def _other_bundle(name: str, bundle: ProgramBundle, options: Options) -> Side:
    other, record = _open(Path(name))
    if _kind(other) != _kind(bundle):
        raise RequestError(
            f"{name}: gives something else than this bundle",
            expected=f"{bundle.manifest.program.output} of {_size(bundle)}",
            got=f"{other.manifest.program.output} of {_size(other)}",
        )
    target = choose_target(other.manifest).id
    return _bundle_side(name, f"bundle {other.manifest.name} on {target}", other, record, target, options.steps)


def _kind(bundle: ProgramBundle) -> tuple[str, str, bool]:
    return bundle.manifest.program.output, _size(bundle), bundle.manifest.takes_prompt
