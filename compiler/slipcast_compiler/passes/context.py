"""What a pass is given besides the denoiser, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from slipcast.progress import Advance
from slipcast_compiler.model.original import Drawing, Image
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.recipe.targets import TargetTable

if TYPE_CHECKING:
    import torch

    from slipcast_compiler.model.rewrite import Denoiser, Rewrite
    from slipcast_compiler.profile.measure import Progress

Floats = npt.NDArray[np.float32]


class Points(Protocol):
    """Points of the original's trajectories, at which a student is compared with it, its teacher. What is compared is
    what the scheduler is given: guidance is in it."""

    @property
    def at_once(self) -> int:
        """How many points go through the student in one call."""

    def __len__(self) -> int:
        """How many points there are."""

    def found(self, chosen: torch.Tensor) -> torch.Tensor:
        """The student's, with gradients, at the points `chosen`: int64 [k], at most `at_once`."""

    def wanted(self, chosen: torch.Tensor) -> torch.Tensor:
        """The teacher's, of the same shape."""


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

    @property
    def images(self) -> tuple[Image, ...]:
        """Calibration images, which trajectories are made of."""

    @property
    def sampled(self) -> dict[str, Any]:
        """What trajectories depend on besides the identity and the images; plain JSON, for the cache's keys."""

    def trajectories(
        self, denoiser: Denoiser, parts: Sequence[Sequence[Image]], progress: Progress
    ) -> tuple[Any, list[Points]]:
        """The denoiser as a module with weights, to be trained in place, and the points of each of the parts.

        NumericalError where the original comes to NaN or infinity.
        """


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

    @property
    def images(self) -> tuple[Image, ...]:
        """See Task."""
        return tuple(zip(self.calibration.prompts, self.calibration.seeds, strict=True))

    @property
    def sampled(self) -> dict[str, Any]:
        """See Task."""
        drawing = self.calibration
        return {"sampling": drawing.sampling.model_dump(mode="json"), "size": list(drawing.original.size)}

    def trajectories(
        self, denoiser: Denoiser, parts: Sequence[Sequence[Image]], progress: Progress
    ) -> tuple[Any, list[Points]]:
        """See Task; on the GPU, if there is one. NumericalError names the layer."""
        import torch

        from slipcast_compiler.host.quiet import quiet
        from slipcast_compiler.passes.trajectories import GuidedStates, record
        from slipcast_compiler.profile.measure import evaluated_sigmas

        drawing, device = self.calibration, "cuda" if torch.cuda.is_available() else "cpu"
        progress.expect(sum(map(len, parts)) * len(evaluated_sigmas(drawing.sampling)))
        with quiet():
            pipe = drawing.open()
        recorded = [record(pipe, drawing, self.batch, part, progress.add).to(device) for part in parts]
        student = denoiser.load(pipe.unet).to(device)
        return student, [GuidedStates(states, student, drawing.sampling) for states in recorded]


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
