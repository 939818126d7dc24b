"""Places in the pipeline's code, as "package/file.py:line"."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any, cast

LIBRARIES = (
    "site-packages/torch/",
    "site-packages/accelerate/",
    "site-packages/PIL/",
    "site-packages/numpy/",
    "slipcast_compiler/capture",
)


def here(package: str = "") -> str:
    """The line that runs now: the innermost of code that is neither a library's nor ours, or that is the package's."""
    frame = cast(Any, sys._getframe(1))
    while frame is not None:
        file = frame.f_code.co_filename
        if _is_own(file) and file.startswith(package):
            return _told(file, frame.f_lineno)
        frame = frame.f_back
    return ""


def raised_at(error: BaseException) -> str:
    """The innermost line that an error came from, of code that is neither a library's nor ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return _told(frames[-1].filename, frames[-1].lineno) if frames else ""


def package_of(kind: type) -> str:
    """The folder of the package that a class is from, or the file of the module that is no package."""
    file = Path(getattr(sys.modules[kind.__module__.partition(".")[0]], "__file__", None) or "")
    return str(file.parent if file.name == "__init__.py" else file)


def _is_own(file: str) -> bool:
    return file.startswith("/") and not any(library in file for library in LIBRARIES)


def _told(file: str, line: int | None) -> str:
    return f"{file.rpartition('site-packages/')[2]}:{line}"
