"""Names, numbers and digests as the records of a manifest have them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from slipcast.bundle.validation import printable

ComponentName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(printable)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
