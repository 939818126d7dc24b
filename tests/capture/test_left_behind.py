"""What a capture leaves behind in its process: nothing."""

from __future__ import annotations

import torch
from torch.utils._device import _device_constructors

from slipcast_compiler.capture.inside import _numbers_kept


def test_constructors_follow_the_device_after_it() -> None:
    """torch remembers once which functions take a context's device: one that stood for torch.tensor then is none."""
    _device_constructors.cache_clear()
    with _numbers_kept(), torch.device("meta"):
        assert torch.empty(1).is_meta
    with torch.device("meta"):
        assert torch.tensor([]).is_meta
