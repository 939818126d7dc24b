"""The part of a denoiser that depends on the timestep alone, as a table: a row for each timestep of the schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Cut, Sampling
from slipcast.bundle.tensorfile import read_header, read_tensor
from slipcast.errors import ArtifactError
from slipcast.sampling.denoiser import Denoiser
from slipcast.sampling.samplers import sample
from slipcast.sampling.schedules import Schedule

Row = dict[str, npt.NDArray[np.float32]]


def evaluated_timesteps(sampling: Sampling, schedule: Schedule) -> tuple[float, ...]:
    """The timesteps at which a run evaluates its denoiser, each once: some samplers ask between a schedule's own.

    Found by running the sampler on nothing: no sampler looks at what it integrates.
    """
    asked: list[float] = []
    nothing = np.zeros((1, 1), np.float32)

    def predict(x: npt.NDArray[np.float32], timestep: float) -> npt.NDArray[np.float32]:
        asked.append(told(timestep))
        return x

    denoise = Denoiser(sampling.noise, schedule, predict)
    for _ in sample(sampling.sampler, denoise, nothing, schedule.sigmas, noise=lambda: nothing, eta=sampling.eta):
        pass
    return tuple(dict.fromkeys(asked))


def told(timestep: float) -> float:
    """The timestep as the model is told it, in float32: the key of its row."""
    return float(np.float32(timestep))


def read_step_table(path: Path, cut: Cut) -> dict[float, Row]:
    """Rows by timestep; ArtifactError where the file is not what the manifest says."""
    entries = read_header(path)
    wanted = {spec.name: (len(cut.timesteps), *spec.shape) for spec in cut.rows}
    found = {name: entry.shape for name, entry in entries.items()}
    if found != wanted or any(entry.dtype != "F32" for entry in entries.values()):
        raise ArtifactError(
            f"{path}: not the table of the manifest",
            expected=f"float32 {wanted}",
            got=f"{found}",
            hint="compile the bundle again",
        )
    columns = {name: read_tensor(path, entry) for name, entry in entries.items()}
    return {
        told(timestep): {name: column[i] for name, column in columns.items()}
        for i, timestep in enumerate(cut.timesteps)
    }
