"""What options of several passes share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

# TOML has one kind of array, so tuples have to be taken from lists in strict mode too.
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


def prunes_by_profile(ratio: float, criterion: str, correct: bool) -> bool:
    """Whether pruning reads the profile: for its criterion, or to correct what remains."""
    return ratio > 0 and (correct or criterion not in ("magnitude", "random"))
