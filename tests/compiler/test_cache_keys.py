"""What code a key follows: the closure of imports of the stage's module, and nothing else."""

from __future__ import annotations

import ast
import functools
import shutil
from pathlib import Path

import pytest

from slipcast_compiler.host import cache, closure
from slipcast_compiler.host.closure import LIBRARIES, ROOTS, Sources, origin, versions

FILES = {
    "a/__init__.py": "",
    "a/stage.py": '"""Words."""\nimport os.path, rich\nimport numpy as np\nfrom a.rooms import helper\n\ndef f():\n'
    '    """More words."""\n    from .lazy import g\n    from b import name\n    return g()\n',
    "a/lazy.py": "from torch import nn\n\ndef g():\n    return 1\n",
    "a/rooms/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import plan\n",
    "a/rooms/helper.py": "import typing\nif typing.TYPE_CHECKING:\n    import a.plan\n"
    "else:\n    from .. import other\n",
    "a/other.py": "from PIL import Image\n",
    "a/plan.py": "import openvino\nfrom a import pages\n",
    "a/pages.py": "def draw():\n    '''A picture.'''\n",
    "b/__init__.py": "import b.deep.er\n\ndef __getattr__(name):\n    from a import plan\n    return plan\n",
    "b/deep/__init__.py": "",
    "b/deep/er.py": "from a import stage\n",
}
CLOSURE = {
    "a", "a.stage", "a.lazy", "a.rooms", "a.rooms.helper", "a.other", "b", "b.deep", "b.deep.er",
}  # fmt: skip
# Rooms that no entry of these kinds has to do with.
KINDS = {
    "export", "parts", "cut", "prompts", "guard", "fallback", "engine", "calibration", "quantized", "original",
    "profile", "pass",
}  # fmt: skip
OUTSIDE = ("pages", "bench", "cli", "study", "compile", "add_target")


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return {"a": tmp_path / "a", "b": tmp_path / "b"}


def test_the_closure_is_what_can_be_imported(packages: dict[str, Path]) -> None:
    sources = Sources(packages)
    found = sources.closure("a.stage")
    assert found == CLOSURE
    assert sources.libraries(found) == {"numpy", "torch", "PIL"}
    assert sources.modules() == CLOSURE | {"a.plan", "a.pages"}


def _digest(packages: dict[str, Path]) -> str:
    sources = Sources(packages)
    return sources.digest(sources.closure("a.stage"))


@pytest.mark.parametrize("module", sorted(CLOSURE))
def test_changed_code_in_the_closure_is_another_key(packages: dict[str, Path], module: str) -> None:
    before, file = _digest(packages), packages["a"].parent / module.replace(".", "/")
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    file.write_text(file.read_text() + "\nADDED = 1\n")
    assert _digest(packages) != before


def test_changed_words_and_other_rooms_are_the_same_key(packages: dict[str, Path]) -> None:
    before, stage = _digest(packages), packages["a"] / "stage.py"
    stage.write_text("# A comment.\n\n" + stage.read_text().replace("ords.", "ords, others."))
    (packages["a"] / "lazy.py").write_text('"""New."""\nfrom torch import nn\n\n\ndef g():\n    "New."\n    return 1\n')
    for other in ("plan", "pages"):
        (packages["a"] / f"{other}.py").write_text("import tensorrt\n")
    assert _digest(packages) == before


def test_a_module_that_takes_the_place_of_a_name_is_seen(packages: dict[str, Path]) -> None:
    (packages["b"] / "name.py").write_text("")
    assert "b.name" in Sources(packages).closure("a.stage")


def test_one_process_has_one_key(packages: dict[str, Path]) -> None:
    """What it has loaded does not change with the files."""
    sources = Sources(packages)
    before = sources.digest(sources.closure("a.stage"))
    (packages["a"] / "lazy.py").write_text("import openvino\n")
    assert sources.digest(sources.closure("a.stage")) == before


def test_a_file_elsewhere_counts_with_what_it_imports(packages: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from a import lazy\nimport yaml\n")
    sources = Sources(packages)
    found = sources.closure(sources.name(script))
    assert found == {str(script), "a", "a.lazy"}
    assert sources.libraries(found) == {"yaml", "torch"}
    moved = tmp_path / "folder" / "script.py"
    moved.parent.mkdir()
    shutil.copyfile(script, moved)
    assert sources.digest([str(script)]) == sources.digest([str(moved)])


def test_a_function_is_of_the_file_it_was_written_in() -> None:
    here = Sources().name(Path(__file__))
    for function in (_digest, functools.partial(functools.partial(_digest), {}), lambda folder: None):
        assert Sources().name(origin(function)) == here
    assert Sources().name(origin(cache.Cache.get)) == "slipcast_compiler.host.cache"
    assert Sources().name(Path(closure.slipcast.__file__)) == "slipcast"


def test_versions_are_of_distributions() -> None:
    found = versions(["PIL", "onnx_ir", "no_such_library"])
    assert set(found) == {"pillow", "onnx-ir", "no_such_library"}
    assert found["no_such_library"] == "absent"
    assert found["pillow"][0].isdigit()


def test_another_version_of_a_library_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache._code.__wrapped__(frozenset({"slipcast_compiler.export.component"}))
    assert {"torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "numpy"} <= before.keys()
    monkeypatch.setattr(cache, "versions", lambda libraries: {**versions(libraries), "torch": "0.1"})
    assert cache._code.__wrapped__(frozenset({"slipcast_compiler.export.component"})) != before


def test_tables_name_what_there_is() -> None:
    ours = Sources().modules()
    assert all(name in ours or "." not in name for name in LIBRARIES)


def _kinds(roots: dict[str, Path]) -> dict[str, str]:
    """Kind -> the module whose code makes it: all calls of cache.get there are."""
    sources, found = Sources(roots), {}
    for file in sorted(roots["slipcast_compiler"].rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cache.get", "self._cache.get"):
                kind = ast.literal_eval(node.args[0])
                found[kind] = sources.name(file)
    return found


def test_words_in_other_rooms_invalidate_nothing(tmp_path: Path) -> None:
    roots = {name: tmp_path / name for name in ROOTS}
    for name, root in ROOTS.items():
        shutil.copytree(root, roots[name], ignore=shutil.ignore_patterns("__pycache__"))
    kinds = _kinds(roots)
    assert kinds.keys() >= KINDS

    def digests() -> dict[str, str]:
        sources = Sources(roots)
        return {kind: sources.digest(sources.closure(module)) for kind, module in kinds.items()}

    before = digests()
    for file in roots["slipcast_compiler"].rglob("*.py"):
        tree = ast.parse(file.read_text())
        if tree.body and ast.get_docstring(tree):
            tree.body[0] = ast.Expr(ast.Constant("Other words."))
        file.write_text(f"# {ast.unparse(tree.body[0]) if tree.body else ''}\n" + ast.unparse(tree))
    assert digests() == before


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_shows_and_measures_is_in_no_closure(kind: str) -> None:
    module = _kinds(ROOTS)[kind]
    rooms = {name.split(".")[1] for name in Sources().closure(module) if name.startswith("slipcast_compiler.")}
    assert not rooms & set(OUTSIDE)
