"""Types that options of several passes share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

# TOML has one kind of array, so tuples have to be taken from lists in strict mode too.
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
