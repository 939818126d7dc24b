"""Weights are on the disk once: parts of one graph refer by offset into one file, in the cache and in a bundle."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from slipcast.bundle.manifest import EngineFiles
from slipcast.bundle.onnxfile import check_external_data, external_files, external_ranges
from slipcast.engines.onnxruntime import open_engine
from slipcast_compiler.engines import BUILDERS
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.graph import qdq
from slipcast_compiler.graph import weights as module
from slipcast_compiler.graph.casting import cast_graph
from slipcast_compiler.graph.cut import extract
from slipcast_compiler.graph.weights import load, read_tensor, save_sharing, share_with
from slipcast_compiler.host import files
from slipcast_compiler.host.cache import Cache

WIDTH = 32
PARTS = ("first", "second")


def _chain(seed: int = 0) -> ir.Model:
    """x -> MatMul -> h -> MatMul -> y, float32 [rows, WIDTH]."""
    random, x = np.random.default_rng(seed), _value("x")
    value, nodes, constants = x, list[ir.Node](), list[ir.Value]()
    for name in ("h", "y"):
        array = random.standard_normal((WIDTH, WIDTH), np.float32)
        weight = ir.Value(name=f"{name}.weight", const_value=ir.tensor(array, name=f"{name}.weight"))
        weight.shape, weight.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        nodes.append(ir.node("MatMul", [value, weight], name=name, outputs=[_value(name)]))
        constants.append(weight)
        value = nodes[-1].outputs[0]
    graph = ir.Graph([x], [value], nodes=nodes, initializers=constants, opset_imports={"": 20}, name="chain")
    return ir.Model(graph, ir_version=10)


def _value(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["rows", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))


def _save(folder: Path, seed: int = 0) -> Path:
    ir.save(_chain(seed), folder / "whole.onnx", external_data="whole.onnx.data")
    return folder / "whole.onnx"


def _cut(source: Path, folder: Path) -> None:
    """The two halves, each of the one that it is in name order."""
    for name, given, wanted in (("first", "x", "h"), ("second", "h", "y")):
        model = ir.load(source)
        values = {str(v.name): v for v in (*model.graph.inputs, *(n.outputs[0] for n in model.graph))}
        save_sharing(extract(model, [values[given]], [values[wanted]]), folder / f"{name}.onnx")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    _cut(_save(tmp_path), tmp_path / "parts")
    return tmp_path / "parts"


def _bytes(*folders: Path) -> int:
    """On the disk: of distinct files of weights."""
    stats = [file.stat() for folder in folders for file in folder.rglob("*.data")]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def _run(model: Path, **arrays: Any) -> Any:
    with open_engine(model, None, "fp32") as engine:
        return next(iter(engine(arrays).values()))


def _same(whole: Path, first: Path, second: Path) -> bool:
    x = np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
    return bool((_run(second, h=_run(first, x=x)) == _run(whole, x=x)).all())


ALL = 2 * WIDTH * WIDTH * 4


def test_parts_refer_into_the_file_of_the_whole(parts: Path) -> None:
    whole = parts.parent / "whole.onnx"
    assert _bytes(parts.parent) == ALL
    assert sorted(file.name for file in parts.iterdir()) == ["first.onnx", "second.onnx", "whole.onnx.data"]
    ranges = [external_ranges(parts / f"{name}.onnx") for name in PARTS]
    assert external_ranges(whole) == ranges[0] | ranges[1]
    assert not ranges[0] & ranges[1]
    assert _same(whole, parts / "first.onnx", parts / "second.onnx")


def test_a_copy_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(files.os, "link", refuse)
    (tmp_path / "parts").mkdir()
    _cut(whole := _save(tmp_path), tmp_path / "parts")
    assert _bytes(tmp_path) == 2 * ALL
    assert _same(whole, *(tmp_path / "parts" / f"{name}.onnx" for name in PARTS))


def test_another_file_of_that_name_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "whole.onnx.data").write_text("another")
    with pytest.raises(FileExistsError):
        _cut(_save(tmp_path), tmp_path / "parts")


def test_what_is_new_goes_into_the_graph(tmp_path: Path) -> None:
    model = ir.load(_save(tmp_path))
    weight = model.graph.initializers["y.weight"]
    weight.const_value = ir.tensor(np.eye(WIDTH, dtype=np.float32), name="y.weight")
    (tmp_path / "new").mkdir()
    save_sharing(model, tmp_path / "new" / "new.onnx")
    assert len(external_ranges(tmp_path / "new" / "new.onnx")) == 1
    x = np.ones((1, WIDTH), np.float32)
    weight = load(tmp_path / "whole.onnx").graph.initializers["h.weight"]
    assert weight.const_value is not None
    np.testing.assert_allclose(_run(tmp_path / "new" / "new.onnx", x=x), x @ weight.const_value.numpy(), rtol=1e-5)


def test_a_file_with_several_names_is_read_for_casts_and_quantising(parts: Path, tmp_path: Path) -> None:
    """Where onnx and onnx_ir refuse it."""
    source, x = parts / "first.onnx", np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
    with pytest.raises(ValueError, match="hard link"):
        ir.load(source).graph.initializers["h.weight"].const_value.numpy()  # type: ignore[union-attr]
    cast_graph(source, "fp16", tmp_path / "fp16.onnx")
    np.testing.assert_allclose(_run(tmp_path / "fp16.onnx", x=x), _run(source, x=x), atol=0.05)
    model = onnx.load(source, load_external_data=False)
    assert qdq.smooth(model, set(), 0.5, lambda names: {}, source.parent) == 0
    qdq.save(model, tmp_path / "saved.onnx", source.parent)
    assert (_run(tmp_path / "saved.onnx", x=x) == _run(source, x=x)).all()
    wanted = load(source).graph.initializers["h.weight"].const_value
    assert wanted is not None
    found = read_tensor(model.graph.initializer[0], source.parent)
    assert (found == wanted.numpy()).all()


def test_what_refers_to_several_files_gets_one_of_its_own(parts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    model, second = load(parts / "first.onnx"), load(_save(other, seed=7))
    tensor = second.graph.initializers["h.weight"].const_value
    extra = ir.Value(name="extra", const_value=tensor, shape=ir.Shape([WIDTH, WIDTH]))
    extra.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(extra)
    save_sharing(model, parts / "joined.onnx")
    assert external_files(parts / "joined.onnx") == {"joined.own.data"}


def test_much_that_is_new_gets_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INLINE", 100)
    save_sharing(_chain(), tmp_path / "new.onnx")
    assert external_files(tmp_path / "new.onnx") == {"new.own.data"}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_take_what_a_graph_names(parts: Path, tmp_path: Path, engine: str) -> None:
    """OpenVINO writes the weights of the part alone; ONNX Runtime's are the file itself."""
    out = tmp_path / "out"
    out.mkdir()
    files = BUILDERS[engine](parts / "first.onnx", "fp32", out)
    assert files.weights
    made = out / files.weights
    if engine == "openvino":
        assert made.stat().st_size < ALL * 0.6
    else:
        assert made.samefile(parts / "whole.onnx.data")
        assert (out / files.model).samefile(parts / "first.onnx")


# --- bundles ---------------------------------------------------------------------------------------------------------


def _engine(cache: Cache, graph: Path, name: str = "") -> tuple[Path, EngineFiles]:
    """An entry of the cache with ONNX Runtime's engine of a graph."""
    made = list[EngineFiles]()

    def make(folder: Path) -> None:
        made.append(BUILDERS["onnxruntime"](graph, "fp32", folder))

    return cache.get("engine", {"graph": str(graph), "name": name}, make), made[0]


def _check(bundle: Path, placed: EngineFiles) -> None:
    """As the runtime does when it opens a bundle."""
    listed = {file.relative_to(bundle).as_posix(): file.stat().st_size for file in bundle.rglob("*") if file.is_file()}
    assert check_external_data(bundle / placed.model, bundle, listed) == {placed.weights}


def test_a_bundle_has_the_weights_of_all_parts_once(parts: Path, tmp_path: Path) -> None:
    cache, pool = Cache(tmp_path / "cache"), Pool(tmp_path / "bundle")
    pool.folder.mkdir()
    engines = [_engine(cache, parts / f"{name}.onnx") for name in PARTS]
    assert _bytes(cache.root, parts) == ALL
    placed = [pool.add(*engine, "onnxruntime-fp32") for engine in engines]
    assert [each.weights for each in placed] == ["onnxruntime-fp32/whole.onnx.data"] * 2
    assert _bytes(pool.folder) == ALL
    assert _same(parts.parent / "whole.onnx", *(pool.folder / each.model for each in placed))
    for each in placed:
        _check(pool.folder, each)
    assert all(file.stat().st_nlink == 1 for file in pool.folder.rglob("*.*"))  # nobody may write to the cache's
    assert [pool.add(*engine, "another") for engine in engines] == placed


def _saved(folder: Path, name: str, model: ir.Model) -> Path:
    folder.mkdir()
    ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
    return folder / f"{name}.onnx"


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_engines_of_one_component_share_what_has_the_same_bytes(tmp_path: Path, library: str) -> None:
    """As those of a denoiser for two sizes, of which one may have more; other weights are in a file of their own."""
    more, x = _chain(), np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
    more.graph.initializers["y.weight"].const_value = _chain(7).graph.initializers["y.weight"].const_value
    graphs = [
        _saved(tmp_path / str(at), f"{name}", model)
        for at, (name, model) in enumerate(
            {"denoiser": _chain(), "denoiser_2": _chain(), "denoiser_3": more, "denoiser_4": _chain(8)}.items()
        )
    ]
    cache, pool = Cache(tmp_path / "cache"), Pool(tmp_path / "bundle")
    pool.folder.mkdir()
    placed = []
    for graph in graphs:
        made = list[EngineFiles]()

        def make(folder: Path, graph: Path = graph, made: list[EngineFiles] = made) -> None:
            made.append(BUILDERS[library](graph, "fp32", folder))

        placed.append(pool.add(cache.get("engine", {"graph": str(graph)}, make), made[0], "t"))
    assert [Path(each.weights or "").stem.partition(".")[0] for each in placed] == [*["denoiser"] * 3, "denoiser_4"]
    weights = {pool.folder / (each.weights or "") for each in placed}
    assert sum(file.stat().st_size for file in weights) == ALL + ALL // 2 + ALL
    for graph, each in zip(graphs, placed, strict=True):
        weights_file = pool.folder / (each.weights or "") if library == "openvino" else None
        with importlib.import_module(f"slipcast.engines.{library}").open_engine(
            pool.folder / each.model, weights_file, "fp32"
        ) as engine:
            np.testing.assert_allclose(engine({"x": x})["y"], _run(graph, x=x), rtol=1e-4, atol=1e-4)


def test_an_engine_without_weights_is_no_sibling(tmp_path: Path) -> None:
    """As OpenVINO's of an update that only adds, beside one for another size that has a constant."""
    bare = _chain()
    for node in list(bare.graph):
        node.replace_input_with(1, node.inputs[0])
    bare.graph.initializers.clear()
    bare.graph.inputs[0].shape = ir.Shape([WIDTH, WIDTH])
    cache, pool = Cache(tmp_path / "cache"), Pool(tmp_path / "bundle")
    pool.folder.mkdir()
    for name, model in (("update", bare), ("update_2", _chain())):
        made = list[EngineFiles]()
        graph = _saved(tmp_path / name, name, model)

        def make(folder: Path, graph: Path = graph, made: list[EngineFiles] = made) -> None:
            made.append(BUILDERS["openvino"](graph, "fp32", folder))

        placed = pool.add(cache.get("engine", {"graph": str(graph)}, make), made[0], "t")
    assert placed.weights == "t/update_2.bin"


def test_a_graph_reads_what_another_one_has_under_the_same_names(tmp_path: Path) -> None:
    folder, x = tmp_path / "graphs", np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
    folder.mkdir()
    other, more = _chain(), _chain()
    more.graph.initializers["y.weight"].const_value = _chain(7).graph.initializers["y.weight"].const_value
    for name, model in (("one", _chain()), ("same", other), ("more", more), ("others", _chain(8))):
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
    wanted = {name: _run(folder / f"{name}.onnx", x=x) for name in ("same", "more", "others")}
    shared = {name: share_with(folder / f"{name}.onnx", folder / "one.onnx") for name in wanted}
    assert shared == {"same": True, "more": True, "others": False}
    assert sorted(file.name for file in folder.glob("*.data")) == ["one.onnx.data", "others.onnx.data"]
    for name, found in wanted.items():
        np.testing.assert_array_equal(_run(folder / f"{name}.onnx", x=x), found)


def test_what_is_not_shipped_is_not_in_the_bundle(parts: Path, tmp_path: Path) -> None:
    cache, pool = Cache(tmp_path / "cache"), Pool(tmp_path / "bundle")
    pool.folder.mkdir()
    placed = pool.add(*_engine(cache, parts / "second.onnx"), "onnxruntime-fp32")
    assert _bytes(pool.folder) == ALL // 2
    _check(pool.folder, placed)
    h = np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
    assert (_run(pool.folder / placed.model, h=h) == _run(parts / "second.onnx", h=h)).all()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_graph_that_reads_all_is_copied(parts: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    """And one that reads some of the same finds it there; whichever comes first."""
    whole, cache, pool = parts.parent / "whole.onnx", Cache(tmp_path / "cache"), Pool(tmp_path / "bundle")
    pool.folder.mkdir()
    graphs = [whole, parts / "first.onnx"]
    placed = {i: pool.add(*_engine(cache, graphs[i]), "onnxruntime-fp32") for i in order}
    assert _bytes(pool.folder) == ALL
    if order == (0, 1):
        assert all((pool.folder / placed[i].model).read_bytes() == graphs[i].read_bytes() for i in order)
    x = np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
    for i in order:
        _check(pool.folder, placed[i])
        assert (_run(pool.folder / placed[i].model, x=x) == _run(graphs[i], x=x)).all()


def test_two_files_of_one_name_are_both_there(parts: Path, tmp_path: Path) -> None:
    """As those of a denoiser in INT8 and of its parts, which are in fp32; or of a rewritten one and its fallback."""
    other = tmp_path / "other"
    other.mkdir()
    whole = _save(other, seed=7)
    cache, pool = Cache(tmp_path / "cache"), Pool(tmp_path / "bundle")
    pool.folder.mkdir()
    placed = [pool.add(*_engine(cache, graph), "t") for graph in (whole, parts / "first.onnx", parts / "second.onnx")]
    assert [each.weights for each in placed] == ["t/whole.onnx.data", "t/first.onnx.data", "t/first.onnx.data"]
    assert _bytes(pool.folder) == 2 * ALL
    for each in placed:
        _check(pool.folder, each)
    assert _same(parts.parent / "whole.onnx", *(pool.folder / each.model for each in placed[1:]))
