"""TensorRT engines where there is no GPU: what is refused and how it is said; and the engine's own work, against a
library and a CUDA that stand in for the real ones and compute on the host."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import document, list_files, write_files

from slipcast.bundle.manifest import Built, Target
from slipcast.bundle.reader import open_bundle
from slipcast.cli.doctor import examine
from slipcast.engines import ENGINES, cuda, refusal
from slipcast.engines.cuda import Cuda, Gpu
from slipcast.engines.targets import choose_target
from slipcast.errors import ArtifactError, HostError, RequestError, ResourceError
from slipcast.run.pipeline import load

VERSION = "1.7.1"
needs_bindings = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not installed: it comes with tensorrt-rtx"
)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with TensorRT-RTX and the given GPU, or none."""

    def make(capability: str | None) -> None:
        gpus = (Gpu("Some GPU", capability, 10**10),) if capability else ()
        monkeypatch.setattr(cuda, "look", lambda: Cuda(gpus, "13.0", None if gpus else "no CUDA device (why)"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr("importlib.metadata.version", lambda name: VERSION)

    return make


def target(version: str = VERSION, capabilities: tuple[str, ...] = ()) -> Target:
    built = Built(library_version=version, compute_capabilities=capabilities, max_images=2)
    return Target(engine="tensorrt-rtx", device="cuda", precision="fp16", components={}, built=built)


class TestRefusal:
    @pytest.mark.parametrize(
        ("gpu", "version", "built_for", "says"),
        [
            ("8.9", VERSION, (), None),
            ("12.0", VERSION, (), None),
            ("8.9", VERSION, ("8.6", "8.9"), None),
            ("7.5", VERSION, ("7.5",), None),
            (None, VERSION, (), r"no CUDA device \(why\)"),
            ("8.9", "1.6.0", (), r"built with tensorrt_rtx 1\.6\.0, and 1\.7\.1 .*pip install 'tensorrt_rtx==1\.6\.0'"),
            ("8.0", VERSION, ("8.6", "8.9"), r"capability 8\.6 and 8\.9, and Some GPU has 8\.0: compile again"),
            ("7.5", VERSION, (), r"portable engines need .* 8\.0 or later.* has 7\.5: compile with .*\[\"7\.5\"\]"),
        ],
    )
    def test_one_line(self, host: Any, gpu: str, version: str, built_for: tuple[str, ...], says: str | None) -> None:
        host(gpu)
        found = refusal(target(version, built_for))
        if says is None:
            assert found is None
        else:
            assert found
            assert "\n" not in found
            assert re.search(says, found)

    @pytest.mark.parametrize(
        ("built_with", "runs"), [("1.6.9", True), ("1.7.0.118", True), (VERSION, True), ("1.7.1.1", False)]
    )
    def test_later_versions_run_what_is_version_compatible(self, host: Any, built_with: str, runs: bool) -> None:
        host("8.9")
        built = Built(library_version=built_with, version_compatible=True, max_images=2)
        found = refusal(target().model_copy(update={"built": built}))
        assert found is None if runs else f"pip install 'tensorrt_rtx>={built_with}'" in (found or "")

    def test_library_of_another_index(self) -> None:
        if ENGINES["tensorrt"].installed():
            pytest.skip("tensorrt is installed")
        assert "pip install 'slipcast[tensorrt]', from NVIDIA's own" in ENGINES["tensorrt"].why_not()

    def test_unknown_engine(self) -> None:
        assert "unknown to this runtime" in (refusal(target().model_copy(update={"engine": "abacus"})) or "")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a portable target after one for a GPU."""
    write_files(root := tmp_path / "bundle")
    (root / "tensorrt-rtx").mkdir()
    (root / "tensorrt-rtx" / "denoiser.engine").write_bytes(b"engine" * 100)
    content = document(list_files(root))
    sizes: dict[str, list[Any]] = {"sample": ["batch", 4, 8, 8], "timestep": [1], "prediction": ["batch", 4, 8, 8]}
    specs = {name: {"name": name, "dtype": "float32", "shape": shape} for name, shape in sizes.items()}
    denoiser = {"inputs": [specs["sample"], specs["timestep"]], "outputs": [specs["prediction"]]}
    content["components"] = {"denoiser": denoiser}
    built = {"library_version": VERSION, "compute_capabilities": ["8.6"], "max_images": 2}
    engine = {"denoiser": {"model": "tensorrt-rtx/denoiser.engine"}}
    gpu = {"engine": "tensorrt-rtx", "device": "cuda", "precision": "fp16", "components": engine, "built": built}
    content["targets"].insert(0, gpu)
    (root / "manifest.json").write_text(json.dumps(content))
    return root


class TestBundle:
    def test_auto_takes_the_portable_target_and_says_why(
        self, bundle: Path, host: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        host("8.9")
        with caplog.at_level(logging.WARNING):
            assert choose_target(open_bundle(bundle).manifest).id == "onnxruntime-cpu-fp32"
        assert "tensorrt-rtx-cuda-fp16-sm86: built for compute capability 8.6, and Some GPU has 8.9" in caplog.text

    def test_asked_for_it_is_refused(self, bundle: Path, host: Any) -> None:
        host("8.9")
        with pytest.raises(HostError, match="Some GPU has 8.9"):
            load(bundle, target="tensorrt-rtx")

    def test_auto_takes_the_gpu_where_it_fits(self, bundle: Path, host: Any) -> None:
        host("8.6")
        assert choose_target(open_bundle(bundle).manifest).id == "tensorrt-rtx-cuda-fp16-sm86"

    def test_doctor_tells_the_same(self, bundle: Path, host: Any) -> None:
        host("8.9")
        found = {finding.name: finding.detail for finding in examine(bundle)}
        assert found["GPU"] == "Some GPU, compute capability 8.9, 10.0 GB; driver for CUDA 13.0"
        assert "built for compute capability 8.6, and Some GPU has 8.9" in found["target tensorrt-rtx-cuda-fp16-sm86"]
        assert found["target onnxruntime-cpu-fp32"].startswith("runs here")

    def test_a_tampered_engine_never_reaches_the_library(
        self, bundle: Path, host: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host("8.6")
        called: list[Any] = []
        monkeypatch.setattr("slipcast.run.base.open_engine", lambda *arguments: called.append(arguments))
        file = bundle / "tensorrt-rtx" / "denoiser.engine"
        content = bytearray(file.read_bytes())
        content[300] ^= 1
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"denoiser\.engine: content differs"):
            load(bundle, target="tensorrt-rtx")
        assert called == []

    def test_more_images_than_it_was_built_for(self, bundle: Path, host: Any) -> None:
        host("8.6")
        with (
            load(bundle, target="tensorrt-rtx", residency="sequential") as pipe,
            pytest.raises(RequestError, match=r"images in one call(.|\n)*an integer from 1 to 2(.|\n)*3"),
        ):
            pipe(num_images_per_prompt=3)


class Stand:
    """A library whose one engine computes y = x + t, on host memory that a stand-in for CUDA hands out."""

    def __init__(self, valid: bool = True, opens: bool = True, runs: bool = True, captures: bool = True) -> None:
        self.captures, self.graphs, self.capturing = captures, list[Any](), False
        self.scratch, self.scratch_asked, self.copied = (0, 0), 64, list[int]()
        self.streamable_weights_size = self.weight_streaming_budget_v2 = 0
        self.memory: dict[int, Any] = {}
        self.freed: list[int] = []
        self.opens, self.runs, self.strategy = opens, runs, ""
        self.addresses: dict[str, int] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.valid = valid

    def module(self) -> ModuleType:
        trt: Any = ModuleType("standing_trt")
        severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)
        trt.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None})
        trt.Severity, trt.__version__ = severity, VERSION
        trt.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        trt.EngineValidity = SimpleNamespace(VALID=0, INVALID=2)
        trt.EngineInvalidityDiagnostics = SimpleNamespace(VERSION_MISMATCH=1, UNSUPPORTED_CC=2, OLD_CUDA_DRIVER=4)
        if self.captures:
            trt.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
        trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="by the user")
        trt.Runtime = lambda logger: SimpleNamespace(
            get_engine_validity=lambda data: (0, 0) if self.valid else (2, 1 | 4),
            deserialize_cuda_engine=lambda data: self if data == b"good" else logger.log(1, "bad magic"),
        )
        return trt

    # The engine.
    num_io_tensors = 3

    def get_tensor_name(self, index: int) -> str:
        return ("x", "t", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name == "y" else "in"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1,)] * 3 if name == "t" else [(1, 4), (2, 4), (8, 4)]

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cuda_graph_strategy="", allocation="")
        config.set_execution_context_allocation_strategy = lambda chosen: setattr(config, "allocation", chosen)
        return config

    def create_execution_context(self, config: Any) -> Any:
        self.strategy = config.cuda_graph_strategy
        assert config.allocation == "by the user"
        return self if self.opens else None

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    # Its context; shapes are the engine's before one is set.
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shape[name] = shape

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1,) if name == "t" else self.shape.get("x", (-1, 4))

    def update_device_memory_size_for_shapes(self) -> int:
        return self.scratch_asked

    def set_device_memory(self, pointer: int, size: int) -> None:
        self.scratch = pointer, size

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        def at(name: str) -> Any:
            shape = self.get_tensor_shape(name)
            buffer = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name])
            return np.frombuffer(buffer, np.float32).reshape(shape)

        def compute() -> None:
            ctypes.memset(self.scratch[0], 7, self.scratch[1])
            at("y")[:] = at("x") + at("t")

        if self.capturing:  # recorded, not run
            self.graphs.append(compute)
        else:
            compute()
        return self.runs

    # CUDA.
    def cudaMalloc(self, size: int) -> tuple[Any, int | None]:  # noqa: N802
        if size > 10_000:
            return self.status.cudaErrorMemoryAllocation, None
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return self.status.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[Any]:  # noqa: N802
        self.freed.append(pointer)
        return (self.status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: Any) -> tuple[Any]:  # noqa: N802
        ctypes.memmove(to, source, size)
        self.copied.append(size)
        return (self.status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:  # noqa: N802
        self.capturing = True
        return (self.status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:  # noqa: N802
        self.capturing = False
        return self.status.cudaSuccess, len(self.graphs) - 1

    def cudaGraphLaunch(self, graph: int, stream: Any) -> tuple[Any]:  # noqa: N802
        self.graphs[graph]()
        return (self.status.cudaSuccess,)

    @property
    def status(self) -> Any:
        return importlib.import_module("cuda.bindings.runtime").cudaError_t


@needs_bindings
class TestEngine:
    @pytest.fixture
    def stand(self, monkeypatch: pytest.MonkeyPatch) -> Stand:
        return self._install(Stand(), monkeypatch)

    def _install(self, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> Stand:
        module = importlib.import_module("slipcast.engines.tensorrt")
        monkeypatch.setitem(sys.modules, "standing_trt", stand.module())
        monkeypatch.setattr(module, "SCRATCH", importlib.import_module("slipcast.engines.device").Scratch())
        for name in (
            "cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaStreamBeginCapture", "cudaStreamEndCapture",
            "cudaGraphLaunch",
        ):  # fmt: skip
            monkeypatch.setattr(module.cuda, name, getattr(stand, name))
        monkeypatch.setattr(module.cuda, "cudaStreamCreate", lambda: (stand.status.cudaSuccess, 7))
        monkeypatch.setattr(module.cuda, "cudaGraphInstantiate", lambda graph, flags: (stand.status.cudaSuccess, graph))
        for name in ("cudaStreamSynchronize", "cudaStreamDestroy", "cudaGraphDestroy", "cudaGraphExecDestroy"):
            monkeypatch.setattr(module.cuda, name, lambda stream: (stand.status.cudaSuccess,))
        return stand

    def _open(self, tmp_path: Path, content: bytes = b"good") -> Any:
        (tmp_path / "denoiser.engine").write_bytes(content)
        module = importlib.import_module("slipcast.engines.tensorrt")
        return module.open_engine(tmp_path / "denoiser.engine", None, "fp16", library="standing_trt")

    def test_computes_and_frees(self, stand: Stand, tmp_path: Path) -> None:
        t = np.array([0.5], np.float32)
        with self._open(tmp_path) as engine:
            assert [(s.name, s.dtype, s.shape) for s in engine.inputs] == [
                ("x", "float32", ("?", 4)),
                ("t", "float32", (1,)),
            ]
            assert [s.name for s in engine.outputs] == ["y"]
            first = engine({"x": np.ones((2, 4), np.float32), "t": t})["y"]
            x = np.arange(16, dtype=np.float32).reshape(4, 4).T  # not contiguous
            np.testing.assert_array_equal(engine({"x": x, "t": t})["y"], x + 0.5)
            np.testing.assert_array_equal(first, np.full((2, 4), 1.5))  # a copy, not a view of the engine's memory
            kept = dict(stand.addresses)
            engine({"x": x[:1], "t": t})
            assert stand.addresses == kept  # what is large enough is used again
        assert stand.strategy == "whole"
        assert sorted(stand.freed) == sorted(stand.memory)  # each once

    def test_engines_share_what_they_compute_in(self, stand: Stand, tmp_path: Path) -> None:
        inputs = {"x": np.ones((2, 4), np.float32), "t": np.ones(1, np.float32)}
        with self._open(tmp_path) as small, self._open(tmp_path) as large:
            small(inputs)
            first = stand.scratch
            assert first[1] == 64
            stand.scratch_asked = 640
            large(inputs)
            assert first[0] in stand.freed  # it grew, and nobody needs the old piece
            grown = stand.scratch
            assert grown[1] == 640
            np.testing.assert_array_equal(small(inputs)["y"], np.full((2, 4), 2.0))
            assert stand.scratch == (grown[0], 64)  # it was told of the new place
        assert sorted(stand.freed) == sorted(stand.memory)

    def test_what_cannot_change_stays_on_the_device(self, stand: Stand, tmp_path: Path) -> None:
        x, t = np.ones((2, 4), np.float32), np.ones(1, np.float32)
        with self._open(tmp_path) as engine:
            engine({"x": x, "t": t})
            t[:] = 2
            np.testing.assert_array_equal(engine({"x": x, "t": t})["y"], np.full((2, 4), 3.0))  # writable: seen
            fixed = np.full((2, 4), 5, np.float32)
            fixed.setflags(write=False)
            engine({"x": fixed, "t": t})
            stand.copied.clear()
            np.testing.assert_array_equal(engine({"x": fixed, "t": t})["y"], np.full((2, 4), 7.0))
            assert stand.copied == [t.nbytes, x.nbytes]  # the latter is the result's
            np.testing.assert_array_equal(engine({"x": x, "t": t})["y"], np.full((2, 4), 3.0))
            np.testing.assert_array_equal(engine({"x": fixed, "t": t})["y"], np.full((2, 4), 7.0))

    def test_calls_are_captured_where_the_library_does_not(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        stand = self._install(Stand(captures=False), monkeypatch)
        t = np.array([0.5], np.float32)
        with self._open(tmp_path) as engine:
            for call in range(4):  # as it is, captured, launched twice
                x = np.full((2, 4), call, np.float32)
                np.testing.assert_array_equal(engine({"x": x, "t": t})["y"], x + 0.5)
                assert len(stand.graphs) == min(call, 1)
            large = np.ones((8, 4), np.float32)  # needs larger buffers, at other addresses
            np.testing.assert_array_equal(engine({"x": large, "t": t})["y"], large + 0.5)
            for _ in range(3):
                np.testing.assert_array_equal(engine({"x": x, "t": t})["y"], x + 0.5)
            assert len(stand.graphs) == 2
        assert stand.strategy == ""

    def test_weights_that_may_stay_on_the_host(self, stand: Stand, tmp_path: Path) -> None:
        stand.streamable_weights_size = 1000
        with self._open(tmp_path):
            assert stand.weight_streaming_budget_v2 == 500

    @pytest.mark.parametrize("shape", [(0, 4), (9, 4), (2, 5), (2,), (2, 4, 1)])
    def test_a_shape_that_it_was_not_built_for(self, stand: Stand, tmp_path: Path, shape: tuple[int, ...]) -> None:
        with (
            self._open(tmp_path) as engine,
            pytest.raises(RequestError, match=r"this shape of x\n.*\[1, 4\] to \[8, 4\]"),
        ):
            engine({"x": np.ones(shape, np.float32), "t": np.ones(1, np.float32)})
        assert stand.addresses == {}

    def test_inputs_by_name(self, stand: Stand, tmp_path: Path) -> None:
        with self._open(tmp_path) as engine, pytest.raises(RequestError, match=r"wrong inputs\n.*x, t"):
            engine({"x": np.ones((1, 4), np.float32)})

    def test_an_engine_of_elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._install(Stand(valid=False), monkeypatch)
        with pytest.raises(
            HostError, match=r"denoiser\.engine: standing_trt 1\.7\.1 cannot run(.|\n)*old cuda driver, version"
        ):
            self._open(tmp_path)

    @pytest.mark.usefixtures("stand")
    def test_a_file_that_the_library_does_not_take(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match="cannot run this engine here(.|\n)*bad magic"):
            self._open(tmp_path, b"other")

    def test_no_memory_for_a_context(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._install(Stand(opens=False), monkeypatch)
        with pytest.raises(ResourceError, match="no execution context(.|\n)*sequential"):
            self._open(tmp_path)

    def test_no_memory_for_a_tensor(self, stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            stand,
            "get_tensor_profile_shape",
            lambda name, _: [(1, 4), (1, 4), (10**6, 4)] if name != "t" else [(1,)] * 3,
        )
        with self._open(tmp_path) as engine, pytest.raises(ResourceError, match="GPU memory ran out"):
            engine({"x": np.ones((10**5, 4), np.float32), "t": np.ones(1, np.float32)})

    def test_an_engine_that_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._install(Stand(runs=False), monkeypatch)
        with self._open(tmp_path) as engine, pytest.raises(HostError, match="the engine failed"):
            engine({"x": np.ones((1, 4), np.float32), "t": np.ones(1, np.float32)})
