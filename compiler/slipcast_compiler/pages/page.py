"""Self-contained pages: the templates beside this file, of which base.html has the style."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from slipcast_compiler.pages.svg import STYLE


def render(template: str, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """The page; every value is escaped, and a missing one is an error."""
    environment = Environment(
        loader=PackageLoader("slipcast_compiler.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["chart_style"] = Markup(STYLE)
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)
