"""Seeds of everything that is drawn, in ranges that do not meet: nothing is judged on noise that it was made with.

torch's generator takes the low 32 bits of a seed, so all ranges lie within them.
"""

from __future__ import annotations

from dataclasses import dataclass

from slipcast.errors import RecipeError


@dataclass(frozen=True)
class Seeds:
    """The seeds `first` to `first + size - 1`, which are for one purpose alone."""

    purpose: str
    first: int
    size: int

    def take(self, count: int, offset: int = 0) -> tuple[int, ...]:
        """`count` seeds, from the one at `offset`; RecipeError where there are not as many."""
        if offset + count > self.size:
            raise RecipeError(
                f"there are not as many seeds for {self.purpose}",
                expected=f"at most {self.size} images, their offset included",
                got=f"{count} from {offset} on",
            )
        return tuple(range(self.first + offset, self.first + offset + count))


GATE = Seeds("the gate", 0, 1 << 28)
OUT_OF_FAMILY = Seeds("prompts out of the family", 1 << 28, 1 << 28)
CALIBRATION = Seeds("calibration", 1 << 30, 1 << 30)
PROFILE = Seeds("the profile", 2 << 30, 1 << 30)
SEARCH = Seeds("the search", 3 << 30, 1 << 30)
RANGES = (GATE, OUT_OF_FAMILY, CALIBRATION, PROFILE, SEARCH)
