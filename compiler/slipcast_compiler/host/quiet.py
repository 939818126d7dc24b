"""Keep what libraries say to their developers off the user's screen."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

# They warn of torchvision's absence, of their own deprecations, and draw bars for what takes milliseconds.
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "diffusers", "transformers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block only errors of LOGGERS are shown, and no warnings. Has to come before their first import."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # diffusers imports ONNX Runtime with its pipelines
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _no_bars()
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _no_bars() -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
