"""The code that a function can run: the closure of its module's imports within our packages, read from the source.

Nothing is imported to find it. Imports count at the top and inside functions, but not under `if TYPE_CHECKING`; nor do
those in a module's own __getattr__ (PEP 562), which are for whoever asks for such a name. The __init__ files of the
packages on the way count. Digests are of the syntax tree without docstrings, so that words change none.
What is imported by a name in a variable is not seen: see LIBRARIES, and `runs` of Cache.get.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slipcast

ROOTS = {"slipcast": Path(slipcast.__file__).parent, "slipcast_compiler": Path(__file__).parents[1]}

# Import names that a module, or a library, takes from variables.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "slipcast_compiler.engines.tensorrt": ("tensorrt_rtx", "tensorrt"),
    "slipcast_compiler.model.checkpoint": ("diffusers", "transformers"),
    "slipcast.engines.tensorrt": ("tensorrt_rtx", "tensorrt"),
    "diffusers": ("transformers", "accelerate"),
    "transformers": ("tokenizers", "safetensors"),
    "onnxscript": ("onnx", "onnx_ir"),
}
SHOWING = frozenset(("click", "rich"))  # what they make is seen, and not kept


@dataclass(frozen=True)
class _Parsed:
    """A source file: the digest of its code, and the absolute names that it may import modules by."""

    digest: str
    names: frozenset[str]


class Sources:
    """Packages on the disk, each file read when it is first asked for, and kept."""

    def __init__(self, roots: Mapping[str, Path] = ROOTS) -> None:
        """`roots`: the folder of each package."""
        self._roots = {name: root.resolve() for name, root in roots.items()}
        self._parsed: dict[str, _Parsed] = {}
        self._closures: dict[str, frozenset[str]] = {}

    def modules(self) -> frozenset[str]:
        """All there are."""
        return frozenset(self.name(file) for root in self._roots.values() for file in root.rglob("*.py"))

    def name(self, file: Path) -> str:
        """The module that a file is, or the path of one that lies elsewhere."""
        file = file.resolve()
        for package, root in self._roots.items():
            if file.is_relative_to(root):
                parts = file.relative_to(root).with_suffix("").parts
                return ".".join((package, *parts[: -1 if parts[-1] == "__init__" else None]))
        return str(file)

    def closure(self, module: str) -> frozenset[str]:
        """All that importing `module` (or a file elsewhere, by its path) and running its functions can import."""
        if module not in self._closures:
            found, waiting = set[str](), [module]
            while waiting:
                if (each := waiting.pop()) not in found:
                    found.add(each)
                    waiting += filter(self._file, (*_parents(each), *self._parse(each).names))
            self._closures[module] = frozenset(found)
        return self._closures[module]

    def digest(self, modules: Iterable[str]) -> str:
        """Of the code of modules. A file elsewhere counts by its name alone, not by its folder."""
        code = sorted((Path(name).name, self._parse(name).digest) for name in modules)
        return hashlib.sha256(repr(code).encode()).hexdigest()

    def libraries(self, modules: Collection[str]) -> frozenset[str]:
        """Import names of what modules import from elsewhere, but for the standard library and what shows progress."""
        names = {name.partition(".")[0] for module in modules for name in self._parse(module).names}
        waiting = [*modules, *(names - self._roots.keys() - sys.stdlib_module_names)]
        found = set(waiting) - set(modules)
        while waiting:
            new = set(LIBRARIES.get(waiting.pop(), ())) - found
            found |= new
            waiting += new
        return frozenset(found - SHOWING)

    def _file(self, module: str) -> Path | None:
        package, _, rest = module.partition(".")
        if package not in self._roots:
            return Path(module) if Path(module).is_absolute() else None
        path = self._roots[package].joinpath(*rest.split("."))
        files = path.with_name(f"{path.name}.py") if rest else path / "__init__.py", path / "__init__.py"
        return next((file for file in files if file.is_file()), None)

    def _parse(self, module: str) -> _Parsed:
        if module not in self._parsed:
            file = self._file(module)
            assert file, module
            stat = file.stat()
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            self._parsed[module] = _parse(file, package, stat.st_size, stat.st_mtime_ns)
        return self._parsed[module]


def origin(function: Callable[..., Any]) -> Path:
    """The file that a function was written in."""
    while isinstance(function, functools.partial):
        function = function.func
    return Path(function.__code__.co_filename)


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of the distributions that libraries, named as they are imported, are part of."""
    found = {}
    for library in libraries:
        for distribution in _distributions().get(library, (library,)):
            try:
                found[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[distribution] = "absent"
    return found


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@functools.cache
def _parse(file: Path, package: str, size: int, mtime_ns: int) -> _Parsed:
    """`size` and `mtime_ns`: of the file, so that one that was changed is read again."""
    tree = ast.parse(file.read_bytes(), file)
    names = frozenset(_imported(tree, package))
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:]
    return _Parsed(hashlib.sha256(ast.dump(tree).encode()).hexdigest(), names)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """What a name is imported from, and the name in it, which may be a module too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for each in node.orelse:
            yield from _imported(each, package)
    else:
        lazy = isinstance(node, ast.Module)
        for child in ast.iter_child_nodes(node):
            if not (lazy and isinstance(child, ast.FunctionDef) and child.name == "__getattr__"):
                yield from _imported(child, package)


def _parents(module: str) -> Iterator[str]:
    """The packages that a module lies in, which are imported with it."""
    while not module.startswith("/") and "." in module:
        module = module.rpartition(".")[0]
        yield module
