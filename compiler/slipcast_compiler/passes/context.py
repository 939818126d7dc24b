"""What a pass is given besides the denoiser, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slipcast.progress import Advance

if TYPE_CHECKING:
    from slipcast_compiler.plan import Plan
    from slipcast_compiler.profile.profile import Profile

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Context:
    """`profile` is None where no pass needs one; `advance(done, total)` reports progress."""

    plan: Plan
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
