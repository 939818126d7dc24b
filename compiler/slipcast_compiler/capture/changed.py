"""Whether a pipeline changes its components for the time of a call, and back again, such as their attention processors.

What a module's code does is not what it did then, if so.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))
_OWN = ("_parameters", "_buffers", "_modules")


class States:
    """Of modules, at several times."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}  # so that no id is used again

    def of(self, module: nn.Module) -> int:
        """Equal for a module that has the attributes and hooks that it had, in all of its parts."""
        return hash(tuple(self._told(value) for each in module.modules() for value in _held(each)))

    def _told(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        self._kept[id(value)] = value
        return id(value)


def _held(module: nn.Module) -> list[Any]:
    """The values of its attributes; those of dicts, such as hooks, in their places."""
    found = list[Any]()
    for name, value in vars(module).items():
        if name not in _OWN:
            found += value.values() if isinstance(value, dict) else [value]
    return found
