"""Memory of a bundle's components: what each adds to the process, and not what was there before."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_add_target import bundle  # noqa: F401 - a fixture: a pixel model

from slipcast.timing.memory import resident_mb
from slipcast_compiler.judge import bundled


def test_what_was_there_before_does_not_count(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    target = "onnxruntime-cpu-fp32"
    added = bundled.measure_memory(bundle, target, "denoiser", lambda done, total: None)
    assert added < resident_mb() / 4  # a few kilobytes of weights, beside all that Python has loaded
    figures = iter([200.0, 230.5])
    monkeypatch.setattr(bundled, "resident_mb", lambda: next(figures))
    assert bundled.measure_memory(bundle, target, "denoiser", lambda done, total: None) == 30.5
