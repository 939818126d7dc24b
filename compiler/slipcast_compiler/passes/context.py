"""What a pass is given besides the denoiser, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from slipcast.progress import Advance
from slipcast_compiler.model.original import Drawing
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.recipe.targets import TargetTable

if TYPE_CHECKING:
    from slipcast_compiler.model.rewrite import Denoiser, Rewrite

Floats = npt.NDArray[np.float32]


class Task(Protocol):
    """A denoiser, and what passes rewrite it for."""

    @property
    def target(self) -> TargetTable:
        """Whose engine rewritten layers are timed in."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the denoiser is; plain JSON, for the cache's keys."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What the shapes follow that `evaluate` calls it with; plain JSON, likewise."""

    def denoiser(self, before: Rewrite) -> Denoiser:
        """As earlier passes left it."""

    def evaluate(self, module: Any) -> None:
        """Call a module like it once, for one image; `module` is on the meta device, and so is what it is given."""


@dataclass(frozen=True)
class DescribedTask:
    """A Task, of a checkpoint whose architecture is described. `calibration`: the images that the profile is made of,
    `batch` of which are drawn at once; it is evaluated for one image, `guided` or not."""

    calibration: Drawing
    target: TargetTable
    guided: bool
    batch: int

    @property
    def identity(self) -> dict[str, Any]:
        """See Task."""
        return {"checkpoint": self.calibration.original.checkpoint.sha256}

    @property
    def sizes(self) -> dict[str, Any]:
        """See Task."""
        return {"sizes": dict(self.calibration.original.sizes), "guided": self.guided}

    def denoiser(self, before: Rewrite) -> Denoiser:
        """See Task."""
        from slipcast_compiler.model.rewrite import Denoiser

        return Denoiser.of(self.calibration.original.checkpoint, before)

    def evaluate(self, module: Any) -> None:
        """See Task."""
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
