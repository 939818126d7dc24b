"""Where the machine that compiled did otherwise than the names of targets say: its figures shall not pass for more."""

from __future__ import annotations

from collections.abc import Iterable

from slipcast.bundle.manifest import Target
from slipcast.engines import refusal

NO_BF16 = "this processor has no bf16 instructions: what would be in bf16 was computed, judged and timed in fp32"


def host_notes(targets: Iterable[Target]) -> dict[str, str]:
    """Target -> one line, for those of which there is something to say."""
    rounded = [t for t in targets if t.engine == "openvino" and t.precision != "fp32" and not refusal(t)]
    if not rounded:
        return {}
    from slipcast.engines.openvino import bf16_is_native

    return {} if bf16_is_native() else {target.id: NO_BF16 for target in rounded}
