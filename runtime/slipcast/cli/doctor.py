"""`slipcast doctor`: interpreter, processor, memory, disk and engines here; and which targets of a bundle run."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slipcast.cli.common import emit, json_option
from slipcast.errors import HostError

if TYPE_CHECKING:
    from slipcast.bundle.records import BaseManifest

# Instruction sets that decide how fast a CPU target is, as /proc/cpuinfo names them.
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
RUNS = "runs here (structure checked, digests not)"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@json_option
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Tell what this machine can run, and which targets of a bundle."""
    findings = examine(bundle)
    width = max(len(finding.name) for finding in findings)
    lines = [f"{'ok ' if f.ok else 'BAD'}  {f.name:<{width}}  {f.detail}" for f in findings]
    bad = [f"{finding.name}: {finding.detail}" for finding in findings if not finding.ok]
    emit({"ok": not bad, "findings": [vars(f) for f in findings]}, "\n".join(lines), as_json)
    if bad:
        sys.exit(HostError.exit_code)


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `ok` is False for what needs mending, and then `detail` says how."""

    name: str
    ok: bool
    detail: str


def examine(bundle: Path | None = None) -> list[Finding]:
    """What this machine has, and the targets of a bundle. No engine library is imported but ONNX Runtime.

    Raises ArtifactError for a damaged bundle.
    """
    import slipcast
    from slipcast.bundle.reader import open_any_bundle
    from slipcast.engines import ENGINES, cpu_threads

    manifest = open_any_bundle(bundle).manifest if bundle else None
    findings = [
        Finding(
            "slipcast", True, f"{slipcast.__version__} on Python {platform.python_version()}, {platform.platform()}"
        ),
        Finding(
            "processor",
            True,
            f"{cpu_threads()} cores for this process; {_vector_units(_cpu_flags())}",
        ),
        Finding("memory", True, _memory()),
        Finding("disk", True, f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here"),
        *_gpus(),
        *(_engine(name) for name in ENGINES),
        _clash(),
        _providers(),
        Finding("compiler", True, _compiler()),
    ]
    return findings + (_targets(manifest) if manifest else [])


def _gpus() -> list[Finding]:
    from slipcast.engines import cuda

    found = cuda.look()
    if found.problem:
        return [Finding("GPU", True, found.problem)]
    return [
        Finding(
            "GPU",
            True,
            f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 1e9:.1f} GB; "
            f"driver for CUDA {found.driver}",
        )
        for gpu in found.gpus
    ]


def _engine(name: str) -> Finding:
    from slipcast.engines import ENGINES

    kind = ENGINES[name]
    if not kind.installed():
        builds = "; targets for it can be built" * kind.can_build()
        return Finding(name, True, f"absent{builds}; {kind.why_not()}")
    found = f"{_version(kind.distribution or name) or 'installed'}; precisions {', '.join(kind.precisions)}"
    if not kind.available():
        found += f"; {'builds, but runs nothing here' if kind.can_build() else 'of no use here'}: {kind.why_not()}"
    return Finding(name, True, found)


def _clash() -> Finding:
    """onnxruntime and onnxruntime-gpu install into the same directory and break each other."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    mend = "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want"
    return Finding(
        "onnxruntime builds", len(both) < 2, "no clash" if len(both) < 2 else f"{' and '.join(both)} clash: {mend}"
    )


def _providers() -> Finding:
    """What the installed build of ONNX Runtime offers; whether one loads, a session tells (engines/onnxruntime.py)."""
    name = "onnxruntime providers"
    try:
        from slipcast.engines.onnxruntime import available_providers

        return Finding(name, True, ", ".join(available_providers()))
    except Exception as error:  # whatever a broken installation raises
        mend = "pip install --force-reinstall onnxruntime"
        return Finding(name, False, f"it cannot be imported ({type(error).__name__}: {error}): {mend}")


def _compiler() -> str:
    missing = [name for name in ("torch", "diffusers", "transformers", "onnxscript") if not _version(name)]
    return "installed" if not missing else f"absent ({', '.join(missing)}): pip install 'slipcast[compiler]'"


def _targets(manifest: BaseManifest) -> list[Finding]:
    from slipcast.engines import refusal

    findings = []
    for target in manifest.targets:
        why_not = refusal(target)
        detail = f"does not run here: {why_not}" if why_not else RUNS
        findings.append(Finding(f"target {target.id}", True, detail))
    if not any(finding.detail == RUNS for finding in findings):
        mend = "none of its targets runs here; install one of the libraries named above"
        findings.append(Finding(manifest.name, False, mend))
    return findings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return [platform.machine()]
    present = set(next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), []))
    return [flag for flag in FLAGS if flag in present]


def _vector_units(flags: list[str]) -> str:
    without = "" if {"avx512_bf16", "amx_bf16"} & set(flags) else "; no bf16: OpenVINO runs bf16 targets in fp32"
    if not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(flags):
        without += "; no VNNI and no AMX: int8 targets gain no speed"
    return (", ".join(flags) or "no known vector units") + without * platform.machine().startswith(("x86", "AMD"))


def _memory() -> str:
    import psutil

    from slipcast.timing.memory import available_mb

    return f"{psutil.virtual_memory().total / 1e9:.1f} GB, {available_mb() / 1e3:.1f} GB available"
