"""Rows of FAULTS.md on a real bundle: what does not fit is refused at load, and running leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slipcast
from slipcast.errors import ArtifactError, NumericalError

TARGETS = ("openvino", "onnxruntime")
PROMPT = "a large red circle on a white background"


@pytest.fixture
def edited(shapes_bundle: Path, tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """A copy of the bundle whose manifest went through a function."""

    def edit(change: Callable[[Any], None]) -> Path:
        root = Path(shutil.copytree(shapes_bundle, tmp_path / "edited"))
        manifest = json.loads((root / "manifest.json").read_text())
        change(manifest)
        (root / "manifest.json").write_text(json.dumps(manifest))
        return root

    return edit


def tensor(component: str, side: str, index: int, **changes: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest["components"][component][side][index].update(changes)


def other_width(manifest: Any) -> None:
    """A bundle that says it makes wider pictures, consistently, of engines that do not."""
    manifest["image"]["width"] = 128
    for side in ("inputs", "outputs"):
        manifest["components"]["denoiser"][side][0]["shape"] = ["batch", 4, 16, 32]


def longer_prompts(manifest: Any) -> None:
    manifest["text"][0]["max_length"] = 77
    manifest["components"]["text_encoder"]["inputs"][0]["shape"] = ["batch", 77]
    manifest["components"]["text_encoder"]["outputs"][0]["shape"] = ["batch", 77, 128]
    manifest["components"]["denoiser"]["inputs"][2]["shape"] = ["batch", 77, 128]


def swapped(manifest: Any) -> None:
    for target in manifest["targets"]:
        parts = target["components"]
        parts["text_encoder"], parts["vae_decoder"] = parts["vae_decoder"], parts["text_encoder"]


ROW_14: dict[str, Callable[[Any], None]] = {
    "shape": other_width,
    "text length": longer_prompts,
    "an unused dimension": tensor("denoiser", "inputs", 2, shape=["batch", 32, 64]),
    "free where the graph is fixed": tensor("denoiser", "inputs", 0, shape=["batch", 4, "height", "width"]),
    "dtype": tensor("text_encoder", "outputs", 0, dtype="float16"),
    "input's name": tensor("text_encoder", "inputs", 0, name="ids"),
    "output's name": tensor("denoiser", "outputs", 0, name="out_sample"),
    "timestep's dtype": tensor("denoiser", "inputs", 1, dtype="int64"),
    "timestep's shape": tensor("denoiser", "inputs", 1, shape=["batch"]),
    "decoder's factor": tensor("vae_decoder", "outputs", 0, shape=["batch", 3, 64, 64]),
    "swapped files": swapped,
}


class TestRow14:
    """Manifest shape, dtype or name that differs from the graph's."""

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("residency", ["all", "sequential"])
    def test_the_copy_itself_loads(self, edited: Any, target: str, residency: Any) -> None:
        with slipcast.load(edited(lambda _: None), target=target, residency=residency) as pipe:
            assert len(pipe(PROMPT, seed=1, num_inference_steps=1).images) == 1

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("what", ROW_14)
    def test_is_refused_at_load(self, edited: Any, target: str, what: str) -> None:
        with pytest.raises(ArtifactError) as caught:
            slipcast.load(edited(ROW_14[what]), target=target)
        assert caught.value.expected is not None
        assert caught.value.got is not None
        assert caught.value.hint
        assert caught.value.exit_code == 4


SCRIPT = """
import json, os, sys, threading

bundle, target, allowed = sys.argv[1:]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os." + name for name in (
    "mkdir", "rename", "remove", "rmdir", "link", "symlink", "truncate", "chmod", "chown", "utime", "setxattr",
    "fork", "forkpty", "exec", "posix_spawn", "system", "spawn")}
seen, broken, on = 0, [], True

def hook(event, arguments):
    global seen
    if not on:
        return
    seen += 1
    bad = event.startswith(("socket.", "subprocess.", "tempfile.", "shutil.", "urllib.", "http.")) or event in CHANGING
    if event == "open":
        path, _, flags = arguments
        bad = bool(isinstance(flags, int) and flags & WRITING) and str(path) != allowed
    if bad:
        broken.append(f"{event} {arguments}"[:300])
        raise PermissionError(f"not on this host: {event} {arguments}")

sys.addaudithook(hook)
import slipcast
with slipcast.load(bundle, target=target) as pipe:
    pipe("a large red circle on a white background", seed=1, num_inference_steps=2).images[0].save(allowed)
on = False
print(json.dumps({"broken": broken, "seen": seen, "target": pipe.target}))
"""


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Name, size, time of change and mode of all that lies below."""
    found = {}
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_mode)
    return found


class TestRow22:
    """Read-only mount, no HOME, no network: loads, writes nothing, opens no socket; not even an engine's telemetry."""

    def run(self, tmp_path: Path, bundle: Path, script: str, target: str) -> subprocess.CompletedProcess[str]:
        for name in ("cwd", "temporary", "out"):
            (tmp_path / name).mkdir(exist_ok=True)
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HOME", "XDG", "TMP", "PYTHON", "ORT_", "CI"))
        } | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", script, bundle, target, tmp_path / "out" / "picture.png"],
            cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    @pytest.mark.parametrize("home", [False, True])  # where there is one, libraries report home, in both senses
    @pytest.mark.parametrize("target", TARGETS)
    def test_writes_nothing_and_opens_no_socket(
        self, shapes_bundle: Path, tmp_path: Path, target: str, home: bool
    ) -> None:
        if home:
            (tmp_path / "home").mkdir()
        bundle = Path(shutil.copytree(shapes_bundle, tmp_path / "bundle"))
        folders = [path for path in (bundle, *bundle.rglob("*")) if path.is_dir()]
        for path in bundle.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = snapshot(bundle)
        try:
            done = self.run(tmp_path, bundle, SCRIPT, target)
        finally:
            after = snapshot(bundle)
            for folder in folders:
                folder.chmod(0o755)  # for pytest to clean up
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert record["broken"] == []
        assert record["seen"] > 100
        assert record["target"].startswith(target)
        assert after == before
        assert list((tmp_path / "cwd").iterdir()) == []
        assert list((tmp_path / "temporary").iterdir()) == []
        # Nor what the hook cannot see, because no Python code did it.
        assert list((tmp_path / "home").iterdir()) == [] if home else not (tmp_path / "home").exists()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["picture.png"]

    @pytest.mark.parametrize(
        "culprit",
        [
            "import socket; socket.socket()",
            "open('left.txt', 'w')",
            "import os; os.mkdir('d')",
            "import os; os.fork()",
            "import subprocess; subprocess.run(['true'])",
        ],
    )
    def test_the_hook_sees_what_it_is_for(self, shapes_bundle: Path, tmp_path: Path, culprit: str) -> None:
        script = SCRIPT.replace("import slipcast\n", f"import slipcast\n{culprit}\n")
        done = self.run(tmp_path, shapes_bundle, script, "onnxruntime")
        assert done.returncode == 1
        assert "not on this host" in done.stderr


class TestRow38:
    """A reduced-precision decoder that overflows is run once more in fp32."""

    def test_with_real_engines(
        self, shapes_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from slipcast.engines import open_engine

        opened = []

        def spoilt(name: str, model: Path, weights: Path, precision: str, contract: Any) -> Any:
            engine = open_engine(name, model, weights, precision, contract)
            opened.append((model.stem, precision))
            return Spoilt(engine) if (model.stem, precision) == ("vae_decoder", "bf16") else engine

        class Spoilt:
            def __init__(self, engine: Any) -> None:
                self.engine = engine

            def __call__(self, arrays: Any) -> Any:
                return {"image": np.full_like(self.engine(arrays)["image"], np.nan)}

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: Any) -> None:
                self.engine.__exit__(*error)

        arguments: Any = {"seed": 1, "num_inference_steps": 4, "output_type": "np"}
        with slipcast.load(shapes_bundle, target="openvino") as pipe:
            expected = pipe(PROMPT, **arguments).images
        monkeypatch.setattr("slipcast.run.base.open_engine", spoilt)
        with slipcast.load(shapes_bundle, target="openvino") as pipe:
            found = pipe(PROMPT, **arguments).images
        assert opened[len(pipe.manifest.components) :] == [("vae_decoder", "fp32")]
        assert "decoding again in fp32" in caplog.text
        assert 0 < np.abs(found - expected).max() < 0.1  # fp32 against bf16: close, and not the same

    @pytest.mark.parametrize("target", TARGETS)
    def test_nan_from_real_engines_stops_at_its_step(self, shapes_bundle: Path, target: str) -> None:
        def poison(_: Any, step: int, __: float, kept: Any) -> Any:
            return {"latents": np.full_like(kept["latents"], np.nan)} if step == 2 else None

        with slipcast.load(shapes_bundle, target=target) as pipe:
            with pytest.raises(NumericalError, match="step 3 of 6"):
                pipe(PROMPT, seed=1, num_inference_steps=6, callback_on_step_end=poison)
            assert len(pipe(PROMPT, seed=1, num_inference_steps=2).images) == 1
