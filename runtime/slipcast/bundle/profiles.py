"""Read a profile: what the compiler measured of a denoiser on calibration prompts. Needs numpy only."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from slipcast.bundle.tensorfile import TensorEntry, read_header, read_tensor
from slipcast.bundle.validation import Strict, dotted, parse_json, problems
from slipcast.errors import ArtifactError

Floats = npt.NDArray[np.float32]

RECORD_NAME, TENSORS_NAME = "profile.json", "profile.safetensors"
KINDS: tuple[Literal["head", "neuron"], ...] = ("head", "neuron")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
BARS = "▁▂▃▄▅▆▇█"


class ProfileRecord(Strict):
    """profile.json: what went in, and the digest of what came out."""

    schema_version: Literal["1.0"] = "1.0"
    name: str
    base_model: str
    inputs: dict[str, Any]  # all that the measurements depend on, prompts and seeds included
    samples: Annotated[int, Field(ge=1)]  # different calibration prompts, or images where there are no prompts
    leave_one_out: Literal["exact", "projected"]
    shared_inputs: dict[str, str]  # linear layer -> the layer that is given the same tensor and was measured for it
    rank_correlations: dict[Literal["head", "neuron"], dict[str, float]]  # "CRITERION CRITERION" -> Spearman's
    tensors_sha256: str
    peak_memory_mb: float  # of the process that measured, with the seconds it took: no part of the digest
    seconds: float

    @property
    def digest(self) -> str:
        """SHA-256 over what went in and what came out."""
        record = self.model_dump(mode="json", exclude={"name", "base_model", "peak_memory_mb", "seconds"})
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ProfileFile:
    """An open profile; tensors are read when they are asked for."""

    folder: Path
    record: ProfileRecord
    entries: dict[str, TensorEntry]

    def read(self, name: str) -> Floats:
        """One tensor; ArtifactError where the profile has none of that name."""
        if name not in self.entries:
            raise ArtifactError(f"{self.folder}: the profile has no {name}", hint="make it again: slipcast profile")
        return read_tensor(self.folder / TENSORS_NAME, self.entries[name])

    def group(self, prefix: str) -> dict[str, Floats]:
        """All tensors called prefix/..., by the rest of the name, block 2 before block 10."""
        names = sorted((name for name in self.entries if name.startswith(f"{prefix}/")), key=_natural)
        return {name.removeprefix(f"{prefix}/"): self.read(name) for name in names}

    def criteria(self, kind: str) -> list[str]:
        """By which heads or neurons (`kind`: head or neuron) were measured."""
        found = (name.partition("/")[0] for name in self.entries if name.startswith(f"{kind}."))
        return sorted({name.removeprefix(f"{kind}.") for name in found})

    def pooled(self, kind: str) -> dict[str, Floats]:
        """Criterion -> importance of all heads or neurons, of every layer one after the other."""
        return {name: np.concatenate(list(self.group(f"{kind}.{name}").values())) for name in self.criteria(kind)}


def is_profile(folder: Path) -> bool:
    """Whether the directory is a profile, and not a bundle."""
    return os.path.isfile(folder / RECORD_NAME)  # and not Path's, which raises where it may not look


def open_profile_file(folder: Path) -> ProfileFile:
    """Read and check a profile; ArtifactError where it is damaged."""
    try:
        document = parse_json((folder / RECORD_NAME).read_bytes(), str(folder / RECORD_NAME))
        record = ProfileRecord.model_validate(document)
        digest = file_sha256(folder / TENSORS_NAME)
    except OSError as error:
        raise ArtifactError(f"{folder}: not a profile", expected=f"{RECORD_NAME}, {TENSORS_NAME}", got=error) from None
    except ValidationError as error:
        listing = "; ".join(f"{dotted(where)}: {what}" for where, what in problems(error, ProfileRecord))
        raise ArtifactError(f"{folder / RECORD_NAME}: not a profile's record", got=listing) from None
    if digest != record.tensors_sha256:
        raise ArtifactError(
            f"{folder / TENSORS_NAME}: its digest differs",
            expected=record.tensors_sha256,
            got=digest,
            hint="make the profile again: slipcast profile",
        )
    return ProfileFile(folder, record, read_header(folder / TENSORS_NAME))


def file_sha256(path: Path) -> str:
    """Of its bytes, without holding them."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summarise(profile: ProfileFile) -> dict[str, Any]:
    """Plain JSON: importance by layer as quantiles, correlations of criteria, and the curves over the steps, which
    captured pipelines have none of."""
    importance: dict[str, Any] = {}
    for kind in KINDS:
        by_criterion = {criterion: profile.group(f"{kind}.{criterion}") for criterion in profile.criteria(kind)}
        importance[f"{kind}s"] = {
            "quantiles": {
                name: {layer: _rounded(np.quantile(scores, QUANTILES)) for layer, scores in layers.items()}
                for name, layers in by_criterion.items()
            },
            "spearman": profile.record.rank_correlations[kind],
            "count": sum(map(len, next(iter(by_criterion.values()), {}).values())),
        }
    curves = _curves(profile)
    record = profile.record
    told = record.model_dump(mode="json", exclude={"rank_correlations"})
    return {**told, "digest": record.digest, "steps": curves, **importance}


def _curves(profile: ProfileFile) -> dict[str, Any] | None:
    if not (steps := profile.group("steps")):
        return None
    changes = profile.group("steps.feature_change")
    return {
        "timesteps": _rounded(steps["timesteps"]),
        "guidance_gap": _rounded(steps["guidance_gap"]),
        "feature_change": {block: _rounded(curve) for block, curve in changes.items()},
    }


def render_summary(summary: dict[str, Any]) -> str:
    """The summary as text."""
    inputs = summary["inputs"]
    lines = [
        f"{summary['name']}: a profile of {summary['base_model']}  {summary['digest'][:16]}",
        f"  measured on  {len(inputs['prompts'])} images of {summary['samples']} prompts, {_sampled(inputs)}; "
        f"{inputs['options']['states']} states for taylor and leave_one_out ({summary['leave_one_out']})",
        f"  cost         {summary['seconds']:.0f} s, {summary['peak_memory_mb']:.0f} MB",
    ]
    for kind in ("heads", "neurons"):
        found = summary[kind]
        lines.append(f"{kind}: {found['count']}; smallest, quartiles and largest importance of each layer")
        for criterion, layers in found["quantiles"].items():
            lines.append(f"  {criterion}")
            width = max(map(len, layers), default=0)
            for layer, quantiles in layers.items():
                lines.append(f"    {layer:<{width}}  " + "  ".join(f"{value:9.3g}" for value in quantiles))
        lines += [f"  rank correlation  {value:+.3f}  {pair}" for pair, value in found["spearman"].items()]
    if not (curves := summary["steps"]):
        return "\n".join(lines)
    times = curves["timesteps"]
    lines.append(f"steps: timesteps {times[0]:g} to {times[-1]:g}; change of features from one to the next")
    rows = curves["feature_change"] | ({"guidance gap": curves["guidance_gap"]} if curves["guidance_gap"] else {})
    width = max(map(len, rows), default=0)
    for name, curve in rows.items():
        shown = f"{min(curve):.3g} to {max(curve):.3g}" if curve else "one step only"
        lines.append(f"  {name:<{width}}  {sparkline(curve)}  {shown}")
    return "\n".join(lines)


def _sampled(inputs: dict[str, Any]) -> str:
    """How the images were drawn: with what sampling, or by which calls of a captured pipeline."""
    if calls := inputs.get("calls"):
        return f"by {len(calls)} {'call' if len(calls) == 1 else 'calls'} of the pipeline"
    sampling = inputs["sampling"]
    return f"{sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance_scale']:g}"


def sparkline(values: list[float]) -> str:
    """A curve in one line of text, from zero to its largest value."""
    top = max(values, default=0.0) or 1.0
    return "".join(BARS[min(int(value / top * len(BARS)), len(BARS) - 1)] for value in values)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _rounded(values: npt.NDArray[Any]) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
