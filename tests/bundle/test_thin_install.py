"""The runtime alone: its wheel in an empty venv makes images, and where torch is installed it is not imported."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "runtime"
PROMPT = "a large red circle on a white background"
HEAVY = ("torch", "diffusers", "transformers")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process that sees nothing of this one's environment but what pip and the loader need."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True, check=False, timeout=600)


def succeed(*command: str | Path, cwd: Path) -> str:
    """What the command wrote to stdout; the test fails with all it wrote where it did not exit with 0."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a venv that holds slipcast[openvino], installed from its wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("thin")
    source, venv = folder / "source", folder / "venv"
    for name in ("runtime", "compiler"):  # a copy: setuptools leaves a build directory where it builds
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    succeed(*pip, "wheel", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("slipcast-*.whl")
    succeed(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)
    succeed(*pip, "--python", venv, "install", "-c", ROOT / ".ci" / "constraints.txt", f"{wheel}[openvino]", cwd=folder)
    return venv / "bin"


@pytest.mark.slow
def test_torch_is_not_installed(thin: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as u; print([name for name in {HEAVY} if u.find_spec(name)])"
    assert succeed(thin / "python", "-c", code, cwd=tmp_path).strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_makes_an_image(thin: Path, shapes_bundle: Path, tmp_path: Path, target: str) -> None:
    bundle = shutil.copytree(shapes_bundle, tmp_path / "shapes")
    picture = tmp_path / "circle.png"
    out = succeed(
        thin / "slipcast", "run", bundle, "--prompt", PROMPT, "--seed", "7", "--target", target, "-o", picture,
        "--json", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(out)["target"].startswith(f"{target}-cpu-")
    image = json.loads((bundle / "manifest.json").read_text())["image"]
    with Image.open(picture) as opened:
        assert opened.size == (image["width"], image["height"])
        red, green, _ = np.asarray(opened.convert("RGB")).astype(int).transpose(2, 0, 1)
    # The circle is red where the background is white: green tells them apart, red does not.
    assert green.std() > 40
    assert red[green < 128].mean() > 150


@pytest.mark.slow
def test_compile_is_listed_and_says_how_to_install_it(thin: Path, tmp_path: Path) -> None:
    assert "\n  compile " in succeed(thin / "slipcast", "--help", cwd=tmp_path)
    done = run(thin / "slipcast", "compile", ROOT / "recipes" / "shapes-circles.toml", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "pip install 'slipcast[compiler]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bundle_is_benchable_without_torch(thin: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    arguments = ("bench", shapes_bundle, "--images", "2", "--steps", "2", "--json")
    found = json.loads(succeed(thin / "slipcast", *arguments, "-o", "bench.json", cwd=tmp_path))
    assert found["sides"]["bundle"]["seconds"]["median"] > 0
    assert found["files"] == {"json": "bench.json", "html": None}  # the page needs jinja2
    done = run(thin / "slipcast", *arguments, "--against", "diffusers", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "diffusers: needs torch and diffusers and transformers; pip install 'slipcast[compiler]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino:fp32", "onnxruntime-gpu:fp16"])
def test_what_adds_a_target_is_told(thin: Path, shapes_bundle: Path, tmp_path: Path, target: str) -> None:
    """Not torch: see test_add_target.py."""
    done = run(thin / "slipcast", "build", shapes_bundle, "-o", tmp_path / "more", "--target", target, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "pip install 'slipcast[build]'" in done.stderr


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_torch_is_not_imported_where_it_is_installed(shapes_bundle: Path, tmp_path: Path, target: str) -> None:
    code = f"""
import json, sys
from importlib.util import find_spec
import slipcast
with slipcast.load({str(shapes_bundle)!r}, target={target!r}) as pipe:
    picture = pipe({PROMPT!r}, seed=7, num_inference_steps=2).images[0]
names = [*{HEAVY}, "slipcast_compiler"]
print(json.dumps([picture.size, [n for n in names if find_spec(n)], [n for n in names if n in sys.modules]]))
"""
    size, installed, imported = json.loads(succeed(sys.executable, "-c", code, cwd=tmp_path))
    assert size == [64, 64]
    assert set(installed) == {*HEAVY, "slipcast_compiler"}
    assert imported == []


@pytest.mark.parametrize("module", ["bench.run", "bench.table", "add_target", "engines.pool"])
def test_what_works_without_torch_does_not_import_it(module: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; import slipcast_compiler.{module}"
    succeed(sys.executable, "-c", code, cwd=tmp_path)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at any depth, also by `__import__` and `import_module` of a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "slipcast"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("__import__", "import_module"):
                yield node.lineno, str(node.args[0].value)


def test_runtime_sources_import_nothing_banned() -> None:
    """As the linter's rule, and from its table; the linter does not see imports by name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    banned = set(settings["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"])
    assert banned >= {*HEAVY, "slipcast_compiler"}
    sources = sorted(RUNTIME.rglob("*.py"))
    found = [(file, *place) for file in sources for place in imports(ast.parse(file.read_text("utf-8")))]
    assert {module.partition(".")[0] for _, _, module in found} >= {"numpy", "onnxruntime", "openvino"}
    bad = [f"{file.relative_to(ROOT)}:{line}: {name}" for file, line, name in found if name.partition(".")[0] in banned]
    assert not bad
