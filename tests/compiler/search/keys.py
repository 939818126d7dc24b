"""A build cache that builds nothing: make_graphs goes its whole way, each stage with its key, and takes no time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from slipcast_compiler import graphs
from slipcast_compiler.host.cache import Cache, code_of
from slipcast_compiler.model.rewrite import TENSORS

CONTRACT = json.dumps(
    {"inputs": [{"name": "features", "dtype": "float32", "shape": ["batch", 4]}], "outputs": []}
)  # fmt: skip


class Keys(Cache):
    """Directories under the real keys, each with the least that the next stage reads. `asked`: their names."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def get(self, kind: str, inputs: dict[str, Any], build: Callable[[Path], None], runs: Iterable[str] = ()) -> Path:
        given = json.dumps([kind, inputs, code_of(build, runs)], sort_keys=True)
        digest = hashlib.sha256(given.encode()).hexdigest()
        folder = self.root / f"{kind}-{digest[:32]}"
        folder.mkdir(parents=True, exist_ok=True)
        self.asked.append(folder.name)
        for name, content in contents(kind, inputs).items():
            (folder / name).write_text(content)
        if kind == "pass":
            save_file({"w": np.frombuffer(digest.encode(), np.uint8).astype(np.float32)}, folder / TENSORS)
        return folder


def contents(kind: str, inputs: dict[str, Any]) -> dict[str, str]:
    """Of the files in an entry, by name."""
    contracts = {
        f"{name}.json": CONTRACT
        for name in ("text_encoder", "denoiser", "denoiser_prompt", "denoiser_step", "denoiser_shallow", "vae_decoder")
    }
    match kind:
        case "export":
            return {f"{inputs['component']}.json": CONTRACT}
        case "parts":
            return contracts | {"cut.json": "{}"}
        case "cut":
            return contracts | {"cut.json": json.dumps({"feature": "features", "share": 0.2})}
        case "reuse":
            steps = inputs["graphs"]["sampling"]["steps"]
            return {"reuse.json": json.dumps([[1.0 if i < j else None for j in range(steps)] for i in range(steps)])}
        case "timesteps":
            steps = inputs["sampling"]["steps"]
            return {"timesteps.json": json.dumps({"sigmas": [*np.linspace(10, 1, steps), 0.0]})}
        case "pass":
            return {"report.json": json.dumps({"layers": {}, "retention": 0.7, "options": inputs["options"]})}
        case "quantized":
            return {"quantize.json": "{}"}
    return {}


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The cache, with a profile that is told from others by what it is made from."""

    def profile(drawing: Any, options: Any, name: str, cache: Cache, advance: Any) -> Any:
        folder = cache.get("profile", drawing.inputs | {"options": options.model_dump(mode="json")}, lambda out: None)
        return SimpleNamespace(folder=folder, digest=folder.name)

    monkeypatch.setattr(graphs, "make_profile", profile)
    return Keys(tmp_path / "cache")
