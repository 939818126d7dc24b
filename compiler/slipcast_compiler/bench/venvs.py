"""Virtual environments for peers whose libraries need other versions than the compiler's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from slipcast.errors import HostError

RECORD = "slipcast-bench.json"


@dataclass(frozen=True)
class Venv:
    """`constraints` as pip takes them; `unwanted` is what the packages pull in and pictures do not need."""

    packages: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()

    def python(self, folder: Path) -> Path | None:
        """The interpreter, where the environment was made in full and of these very packages."""
        try:
            made = json.loads((folder / RECORD).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return folder.absolute() / "bin" / "python" if made == self.record else None

    @property
    def record(self) -> dict[str, list[str]]:
        """What the environment is made of."""
        return {"packages": list(self.packages), "constraints": list(self.constraints), "unwanted": list(self.unwanted)}


# The version of torch is the compiler's, so that peers run on the same one, and its build for CPUs serves all.
_TORCH = ("torch==2.13.0",)
VENVS: dict[str, Venv] = {
    "optimum-onnxruntime": Venv(("optimum-onnx[onnxruntime]==0.1.0", "diffusers"), _TORCH),
    # torchvision comes as a build for CUDA, which a torch for CPUs cannot load; and then transformers fails to import.
    "optimum-openvino": Venv(
        ("optimum==2.3.0", "optimum-intel[openvino]==2.2.0", "diffusers", "openvino-genai==2026.4.1.0"),
        _TORCH,
        unwanted=("torchvision",),
    ),
}


def make(venv: Venv, folder: Path) -> None:
    """Make the environment at `folder`, unless it is there. HostError, with pip's last words, where it fails."""
    if venv.python(folder):
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(venv.constraints))
        constraints.flush()
        _run([*pip, "install", "-c", constraints.name, *venv.packages], folder)
    if venv.unwanted:
        _run([*pip, "uninstall", "--yes", *venv.unwanted], folder)
    (folder / RECORD).write_text(json.dumps(venv.record), "utf-8")


def _run(command: list[str], folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(
            f"{folder}: the environment cannot be made",
            expected=f"{' '.join(command[2:])} to succeed",
            got="\n".join(done.stderr.strip().splitlines()[-3:]),
            hint="check the network and the package index, then repeat with --make-venvs",
        )
