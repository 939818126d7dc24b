"""Pipelines of blocks, of the components of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slipcast_compiler.capture.blocks import with_manners


def of_blocks(kind: str, make: Callable[[], Any]) -> Callable[[], Any]:
    """`kind`: the class, of diffusers, that takes what make() is made of."""

    def made() -> Any:
        import diffusers

        pipe = getattr(diffusers, kind)()
        parts = {name: part for name, part in make().components.items() if part is not None}
        pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.component_names})
        return with_manners(pipe)

    return made
