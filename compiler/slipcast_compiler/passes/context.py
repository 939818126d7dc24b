"""What a pass is given besides the denoiser, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.progress import Advance
from slipcast_compiler.model.original import Drawing
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.recipe.targets import TargetTable

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """What passes rewrite for. `calibration`: the images that the profile is made of, `batch` of which are drawn at
    once; `target`: whose engine the rewritten layers are timed in, on one image, `guided` or not."""

    calibration: Drawing
    target: TargetTable
    guided: bool
    batch: int

    def evaluate(self, module: Any) -> None:
        """Call the denoiser once, for one image; `module` is on the meta device, and so is what it is given."""
        import torch

        original = self.calibration.original
        sizes = {**original.sizes, "batch": 2 if self.guided else 1}
        source = original.checkpoint.architecture.components["denoiser"]
        shapes = [[d if isinstance(d, int) else sizes[d] for d in spec.shape] for spec in source.inputs]
        with torch.no_grad():
            source.call(module, *(torch.empty(shape, device="meta") for shape in shapes))


@dataclass(frozen=True)
class Context:
    """`profile` is None where no pass needs one; `advance(done, total)` reports progress."""

    task: Task
    profile: Profile | None
    advance: Advance

    @property
    def measured(self) -> Profile:
        """The profile, of a pass that said it needs it."""
        assert self.profile is not None
        return self.profile


@dataclass(frozen=True)
class Result:
    """Changed parameters by name, float32, none where nothing was to be done; `report` has to be JSON."""

    tensors: Mapping[str, Floats] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
