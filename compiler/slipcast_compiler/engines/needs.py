"""What rewriting a graph needs, which a host that only runs bundles has not."""

from __future__ import annotations

import importlib.util

from slipcast.errors import HostError


def need_graph_libraries() -> None:
    """HostError, with the command that installs them, where ONNX graphs cannot be rewritten."""
    if missing := [name for name in ("onnx", "onnx_ir") if importlib.util.find_spec(name) is None]:
        raise HostError(
            f"graphs cannot be rewritten here: {' and '.join(missing)} not installed",
            hint="pip install 'slipcast[build]'",
        )
