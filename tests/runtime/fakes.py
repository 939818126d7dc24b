"""A bundle whose engines are Python functions: the whole pipeline in a millisecond, and a record of what it did."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import list_files

from slipcast.bundle.manifest import FORMATS, Component

TOKENIZER = Path(__file__).parents[2] / "recipes" / "models" / "shapes" / "tokenizer" / "tokenizer.json"
CHANNELS, SIZE, FACTOR, LENGTH, WIDTH = 4, 8, 2, 12, 5
COMPONENTS = ("text_encoder", "denoiser", "vae_decoder")
LATENT = (CHANNELS, SIZE, SIZE)


def spec(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def document(root: Path, **changes: Any) -> dict[str, Any]:
    """manifest.json of a text-to-image bundle with two targets; `changes` replace top-level keys."""
    latent = ("b", CHANNELS, SIZE, SIZE)
    components = {
        "text_encoder": {
            "inputs": [spec("input_ids", "b", LENGTH, dtype="int64")],
            "outputs": [spec("hidden", "b", LENGTH, WIDTH)],
        },
        "denoiser": {
            "inputs": [spec("sample", *latent), spec("timestep", 1), spec("context", "b", LENGTH, WIDTH)],
            "outputs": [spec("prediction", *latent)],
        },
        "vae_decoder": {
            "inputs": [spec("latent", "b", CHANNELS, "h", "w")],
            "outputs": [spec("image", "b", 3, "H", "W")],
        },
    }
    return {
        "schema_version": "1.0", "slipcast_version": "0.1.0", "name": "fake", "base_model": "tests/fake",
        "source_sha256": "0" * 64, "family": None, "components": components,
        "text": [{
            "component": "text_encoder", "tokenizer": "tokenizer.json", "max_length": LENGTH, "pad_token_id": 655,
            "outputs": {"hidden": "context"},
        }],
        "image": {
            "width": SIZE * FACTOR, "height": SIZE * FACTOR, "channels": CHANNELS, "factor": FACTOR,
            "scaling_factor": 0.5, "tile": SIZE, "overlap": 2,
        },
        "sampling": {
            "sampler": "dpmpp_2m", "schedule": "leading", "steps": 6, "guidance_scale": 3.0,
            "noise": {"prediction": "epsilon", "timestep_spacing": "leading", "steps_offset": 1},
        },
        "targets": [
            {
                "engine": engine, "device": "cpu", "precision": precision,
                "components": {name: engine_files(engine, name) for name in components},
            }
            for engine, precision in (("openvino", "bf16"), ("onnxruntime", "fp32"))
        ],
        "files": list_files(root),
        **changes,
    }  # fmt: skip


def engine_files(engine: str, name: str) -> dict[str, str]:
    """What a component's engine is made of, as the manifest has it."""
    model, weights = FORMATS[engine]
    return {"model": name + model, "weights": name + str(weights)}


def write_engines(root: Path, name: str) -> None:
    """A component's files for both engines: graphs that pass for ones, of nothing."""
    (root / f"{name}.xml").write_text(f'<net name="{name}"/>')
    (root / f"{name}.onnx").write_bytes(b"\x08\x0a\x12" + bytes([len(name)]) + name.encode())  # version, producer
    for suffix in (".bin", ".data"):
        (root / (name + suffix)).write_text(name + suffix)


def write_fake(root: Path, **changes: Any) -> Path:
    root.mkdir(parents=True)
    shutil.copyfile(TOKENIZER, root / "tokenizer.json")
    for name in COMPONENTS:
        write_engines(root, name)
    (root / "manifest.json").write_text(json.dumps(document(root, **changes)))
    return root


def encode(arrays: Mapping[str, Any]) -> dict[str, Any]:
    ids = arrays["input_ids"]
    return {"hidden": np.sin(ids[..., None] * np.arange(1, WIDTH + 1)).astype(np.float32)}


def predict(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Depends on everything it is given, row by row."""
    x, context = arrays["sample"], arrays["context"].mean((1, 2))[:, None, None, None]
    return {"prediction": (0.8 * x + 0.3 * np.tanh(x[:, ::-1] + context) + arrays["timestep"][0] / 1e4).astype(x.dtype)}


def decode(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Three channels, every cell a square of FACTOR pixels."""
    return {"image": np.repeat(np.repeat(arrays["latent"][:, :3] / 4, FACTOR, 2), FACTOR, 3)}


class Fakes:
    """Takes the place of open_engine. `functions` may be replaced; `opened`, `closed` and `calls` record."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., dict[str, Any]]] = {
            "text_encoder": encode, "denoiser": predict, "vae_decoder": decode,
        }  # fmt: skip
        self.opened: list[tuple[str, str]] = []
        self.closed: list[str] = []
        self.calls: list[tuple[str, SimpleNamespace]] = []
        self.open_now: list[str] = []
        self.most_open = 0
        self._lock = threading.Lock()

    def count(self, component: str) -> int:
        return sum(name == component for name, _ in self.calls)

    def __call__(
        self, name: str, model: Path, weights: Path | None, precision: str, contract: Component, profile: bool = False
    ) -> Any:
        with self._lock:
            self.opened.append((model.stem, precision))
            self.open_now.append(model.stem)
            self.most_open = max(self.most_open, len(self.open_now))
        return _FakeEngine(self, model.stem, precision, contract)


class _FakeEngine:
    def __init__(self, fakes: Fakes, name: str, precision: str, contract: Component) -> None:
        self.fakes, self.name, self.precision, self.is_open = fakes, name, precision, True
        self.inputs, self.outputs = contract.inputs, contract.outputs

    def __call__(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        assert self.is_open, f"{self.name} is closed"
        kept = {key: np.array(value) for key, value in arrays.items()}
        self.fakes.calls.append((self.name, SimpleNamespace(precision=self.precision, **kept)))
        return self.fakes.functions[self.name](arrays)

    def __enter__(self) -> _FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self.fakes.closed.append(self.name)
        self.fakes.open_now.remove(self.name)


def install(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Fake engines for this test, whatever is installed."""
    fakes = Fakes()
    monkeypatch.setattr("slipcast.run.base.open_engine", fakes)
    monkeypatch.setattr("slipcast.engines.EngineKind.available", lambda self: True)
    return fakes
