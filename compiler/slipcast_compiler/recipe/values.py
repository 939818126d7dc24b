"""Types of values in recipes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# TOML has one kind of array, so tuples have to be taken from lists in strict mode too.
AsTuple = BeforeValidator(_as_tuple)
Texts = Annotated[tuple[str, ...], AsTuple]
Numbers = Annotated[tuple[float, ...], AsTuple]
