"""Bundles that lie, and bundles that change under a loaded pipeline (rows 41, 42, 44, 49 and 50 of the faults)."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import openvino
import psutil
import pytest
from bundles import list_files
from fakes import write_fake
from onnx import TensorProto, helper, numpy_helper

from slipcast.bundle.manifest import read_manifest
from slipcast.bundle.reader import check_digests, open_bundle
from slipcast.bundle.validation import shown, shown_json
from slipcast.engines.onnxruntime import OnnxRuntimeEngine
from slipcast.errors import ArtifactError
from slipcast.run.pipeline import load

SIZE, WIDTH = 8, 64
ENGINES = {"onnxruntime": (".onnx", ".data"), "openvino": (".xml", ".bin")}
MEMORY_ADDRESS = "*/_ORT_MEM_ADDR_/*"
RUN = [sys.executable, "-m", "slipcast.cli.main"]


def graph(scale: float) -> Any:
    """prediction = scale * sample + 0 * timestep, by convolutions through WIDTH channels."""
    wide = np.zeros((WIDTH, 3, 3, 3), np.float32)
    wide[range(3), range(3), 1, 1] = scale
    back = np.zeros((3, WIDTH, 3, 3), np.float32)
    back[range(3), range(3), 1, 1] = 1
    nodes = [
        helper.make_node("Conv", ["sample", "w"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "v"], ["i"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["timestep", "z"], ["t"]),
        helper.make_node("Add", ["i", "t"], ["prediction"]),
    ]
    latent = ["batch", 3, SIZE, SIZE]
    sample, timestep, prediction = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("sample", latent), ("timestep", [1]), ("prediction", latent))
    )
    tensors = [
        numpy_helper.from_array(each, name) for each, name in ((wide, "w"), (back, "v"), (np.zeros(1, np.float32), "z"))
    ]
    proto = helper.make_graph(nodes, "g", [sample, timestep], [prediction], tensors)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_real(root: Path, scale: float = 0.5, **changes: Any) -> Path:
    """An unconditional model of pixels with real engines for two targets; `changes` replace keys of the manifest."""
    root.mkdir()
    onnx.save_model(graph(scale), root / "d.onnx", save_as_external_data=True, location="d.data", size_threshold=0)
    openvino.save_model(openvino.Core().read_model(root / "d.onnx"), root / "d.xml", compress_to_fp16=False)
    spec = {"dtype": "float32", "shape": ["batch", 3, SIZE, SIZE]}
    sample, prediction = {"name": "sample", **spec}, {"name": "prediction", **spec}
    timestep = {"name": "timestep", "dtype": "float32", "shape": [1]}
    targets = [
        {
            "engine": engine,
            "device": "cpu",
            "precision": "fp32",
            "components": {"denoiser": {"model": f"d{model}", "weights": f"d{weights}"}},
        }
        for engine, (model, weights) in ENGINES.items()
    ]
    document = {
        "schema_version": "1.0",
        "slipcast_version": "0.1.0",
        "name": "real",
        "base_model": "tests/real",
        "source_sha256": "0" * 64,
        "family": None,
        "text": [],
        "targets": targets,
        "components": {"denoiser": {"inputs": [sample, timestep], "outputs": [prediction]}},
        "image": {"width": SIZE, "height": SIZE, "channels": 3, "factor": 1, "tile": SIZE, "overlap": 2},
        "sampling": {
            "sampler": "euler",
            "schedule": "leading",
            "steps": 2,
            "guidance_scale": 1.0,
            "noise": {"prediction": "epsilon"},
        },
    } | changes
    return seal(root, document)


def seal(root: Path, document: dict[str, Any] | None = None) -> Path:
    """Digests of what lies there now: a bundle that is consistent in itself."""
    document = document or json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(document | {"files": list_files(root)}))
    return root


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return write_real(tmp_path / "b")


def draw(pipe: Any) -> Any:
    return pipe(seed=1, output_type="np").images


def cli(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=60, **options
    )


def is_plain(text: str) -> bool:
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text if c not in "\n\t")


class TestWords:
    """A bundle's own text decides no path, and steers no terminal."""

    @pytest.mark.parametrize(
        "name",
        [
            *("../../x/y", "a/b", "a\\b", "/x", "..", ".x", "-o", "", "x" * 101, "c:", "nul"),
            "a\x1b[31m",
            "a\nb",
            "a\u202eb",
        ],
        ids=ascii,
    )
    def test_a_name_is_a_name(self, tmp_path: Path, name: str) -> None:
        root = write_fake(tmp_path / "b", name=name)
        with pytest.raises(ArtifactError, match=r"not valid:\n  name: "):
            read_manifest((root / "manifest.json").read_bytes())

    @pytest.mark.parametrize("name", ["shapes-circles", "sd 1.5", "Kreise_ü", "x"])
    def test_names(self, tmp_path: Path, name: str) -> None:
        root = write_fake(tmp_path / "b", name=name)
        assert read_manifest((root / "manifest.json").read_bytes()).name == name

    def test_pictures_go_where_the_command_was_started(self, tmp_path: Path, real: Path) -> None:
        (tmp_path / "here").mkdir()
        done = cli("run", real, "--seed", "7", "--target", "onnxruntime", cwd=tmp_path / "here")
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["real-7.png"]
        seal(real, json.loads((real / "manifest.json").read_text()) | {"name": "../../outside/y"})
        for command in ("run", "profile-run"):
            done = cli(command, real, cwd=tmp_path / "here")
            assert done.returncode == 4
            assert "name" in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"here", "b"}

    @pytest.mark.parametrize("key", ["base_model", "slipcast_version", "pruning_strategy", "not_compiled"])
    def test_no_line_of_a_manifest_holds_control_characters(self, tmp_path: Path, key: str) -> None:
        text = "plain\x1b]0;owned\x07\u202e"
        root = write_fake(tmp_path / "b", **{key: [text] if key == "not_compiled" else text})
        done = cli("inspect", root, cwd=tmp_path)
        assert done.returncode == 4
        assert "control or invisible character" in done.stderr
        assert is_plain(done.stdout + done.stderr)

    def test_a_report_is_shown_escaped(self, real: Path, tmp_path: Path) -> None:
        words = "\x1b[2Jgone\u202e\x9b"
        (real / "report.json").write_text(json.dumps({"search": {"arguments": words}}))
        (real / "report.html").write_text("")
        seal(real)
        done = cli("report", real, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "found by search: \\x1b[2Jgone\\u202e\\x9b" in done.stdout
        assert is_plain(done.stdout)
        done = cli("report", real, "--json", cwd=tmp_path)
        assert is_plain(done.stdout)
        assert json.loads(done.stdout)["search"]["arguments"] == words

    def test_errors_and_logs_are_shown_escaped(self, real: Path, tmp_path: Path) -> None:
        (real / "x\x1b[31m\u202e.txt").write_text("")
        done = cli("verify", real, cwd=tmp_path)
        assert done.returncode == 4
        assert is_plain(done.stderr)
        assert "31m" in done.stderr

    def test_shown(self) -> None:
        assert shown("a ü 漢\n\tb") == "a ü 漢\n\tb"
        assert shown("\x00\x1b\x7f\x9b\u200b\u2028\u202e\ud800\U000e0001") == (
            "\\x00\\x1b\\x7f\\x9b\\u200b\\u2028\\u202e\\ud800\\U000e0001"
        )
        document = {"é\x7f": "\U000e0001\u202eü\n"}
        text = shown_json(json.dumps(document, ensure_ascii=False, indent=1))
        assert is_plain(text)
        assert json.loads(text) == document


def external(location: str) -> bytes:
    """An ONNX model whose weight lies at `location`."""
    model = graph(0.5)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "4096"), ("length", str(WIDTH * 3 * 9 * 4))):
        weight.external_data.add(key=key, value=value)
    data: bytes = model.SerializeToString()
    return data


def named(target: int, **files: str) -> Callable[[Path], None]:
    """Other files for a target's engine."""

    def change(root: Path) -> None:
        document = json.loads((root / "manifest.json").read_text())
        document["targets"][target]["components"]["denoiser"] |= files
        (root / "manifest.json").write_text(json.dumps(document))

    return change


def written(name: str, data: bytes | str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())  # type: ignore[return-value]


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / "d.xml").read_text()
        assert old in text
        (root / "d.xml").write_text(text.replace(old, new, 1))

    return change


IR = "d.xml: not an OpenVINO graph"
FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "ONNX named .xml": (written("d.xml", external("d.data")), IR),
    "ONNX named .xml that reads memory": (written("d.xml", external(MEMORY_ADDRESS)), IR),
    "ONNX that reads memory": (written("d.onnx", external(MEMORY_ADDRESS)), "at a refused location"),
    "ONNX named .xml for ONNX Runtime": (named(0, model="d.xml"), "'d.xml' is no file of this engine: .onnx"),
    "ONNX for OpenVINO": (named(1, model="d.onnx"), "'d.onnx' is no file of this engine: .xml"),
    "weights of another format": (named(1, weights="d.data"), "'d.data' is no file of this engine: .bin"),
    "no weights named": (named(0, weights=None), "d.onnx: reads weights of another file"),  # type: ignore[arg-type]
    "another file's weights": (written("d.onnx", external("d.bin")), "d.onnx: reads weights of another file"),
    "TensorFlow's bytes": (written("d.xml", b"\n\x15\n\x05input"), IR),
    "UTF-16": (written("d.xml", "<net/>".encode("utf-16")), IR),
    "another root": (written("d.xml", "<html/>"), f"{IR}(.|\n)*a <html>"),
    "an entity": (written("d.xml", '<!DOCTYPE net [<!ENTITY a "b">]><net/>'), f"{IR}(.|\n)*no DOCTYPE"),
    "no XML": (written("d.xml", "<net>"), f"{IR}(.|\n)*well-formed"),
    "beyond the weights": (replaced('offset="0"', 'offset="99999999"'), f"{IR}(.|\n)*within the .* bytes of d.bin"),
    "a negative offset": (replaced('offset="0"', 'offset="-4"'), f"{IR}(.|\n)*offsets and sizes"),
    "an XML named .onnx": (written("d.onnx", "<net/>"), "d.onnx: not an ONNX model"),
}


class TestFormats:
    """All digests are right, and all that is wrong is said before a library sees the file."""

    @pytest.mark.parametrize("what", FORMATS)
    def test_is_not_what_it_is_called(self, real: Path, what: str) -> None:
        change, says = FORMATS[what]
        change(real)
        seal(real)
        with pytest.raises(ArtifactError, match=says) as caught:
            check_digests(open_bundle(real))
        assert caught.value.exit_code == 4
        for target in ENGINES:
            if f"{target}-" in says or (says.startswith(IR) and target == "openvino"):
                with pytest.raises(ArtifactError, match=says):
                    load(real, target=target)

    def test_both_targets_are_sound_otherwise(self, real: Path) -> None:
        check_digests(open_bundle(real))
        pictures = []
        for target in ENGINES:
            with load(real, target=target) as pipe:
                pictures.append(draw(pipe))
        np.testing.assert_allclose(*pictures, atol=1e-4)

    def test_onnxruntime_is_told_that_it_is_onnx(self, real: Path) -> None:
        """Bytes that pass for ONNX here, and for the format of its own, by what stands at byte 4, there."""
        model = onnx.load(real / "d.onnx", load_external_data=False)
        model.ClearField("ir_version")
        disguised = b"\x08\x0a\x12\x04ORTM" + model.SerializeToString()
        (real / "d.onnx").write_bytes(disguised)
        with OnnxRuntimeEngine(real / "d.onnx", real / "d.data") as engine:
            assert [spec.name for spec in engine.inputs] == ["sample", "timestep"]


@pytest.mark.parametrize("target", ENGINES)
class TestFilesThatChange:
    """What was verified is what is drawn from, or nothing."""

    def other(self, tmp_path: Path) -> Path:
        return write_real(tmp_path / "other", scale=0.9)

    @pytest.mark.parametrize("residency", ["all", "sequential"])
    def test_replaced_by_others(self, real: Path, tmp_path: Path, target: str, residency: Any) -> None:
        other = self.other(tmp_path)
        with load(real, target=target, residency=residency) as pipe:
            expected = draw(pipe)
            for suffix in ENGINES[target]:
                os.replace(other / f"d{suffix}", real / f"d{suffix}")
            np.testing.assert_array_equal(draw(pipe), expected)
            pipe.close()
            np.testing.assert_array_equal(draw(pipe), expected)  # opened again
        with pytest.raises(ArtifactError, match="content differs"):
            load(real, target=target)

    def test_replaced_between_loading_and_drawing(self, real: Path, tmp_path: Path, target: str) -> None:
        with load(real, target=target) as pipe:
            expected = draw(pipe)
        other = self.other(tmp_path)
        with load(real, target=target, residency="sequential") as pipe:
            for suffix in ENGINES[target]:
                os.replace(other / f"d{suffix}", real / f"d{suffix}")
            np.testing.assert_array_equal(draw(pipe), expected)

    def test_written_to_in_place(self, real: Path, tmp_path: Path, target: str) -> None:
        with load(real, target=target, residency="sequential") as pipe:
            weights = real / f"d{ENGINES[target][1]}"
            status = weights.stat()
            with weights.open("r+b") as file:
                file.seek(16)
                file.write(b"\x7f")
            os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time are as they were
            with pytest.raises(ArtifactError, match=f"{weights.name}: changed since the bundle was opened") as caught:
                draw(pipe)
        assert caught.value.exit_code == 4

    @pytest.mark.parametrize("residency", ["all", "sequential"])
    def test_truncated_in_place(self, real: Path, tmp_path: Path, target: str, residency: str) -> None:
        """In a process of its own, which a mapped file would end by SIGBUS."""
        script = (
            "import os, sys, slipcast\n"
            "bundle, target, residency, weights = sys.argv[1:]\n"
            "pipe = slipcast.load(bundle, target=target, residency=residency)\n"
            "if residency == 'all': pipe(seed=1)\n"
            "os.truncate(weights, 0)\n"
            "try:\n"
            "    pipe(seed=1); print('drawn')\n"
            "except slipcast.ArtifactError as error:\n"
            "    print(error)\n"
        )
        weights = real / f"d{ENGINES[target][1]}"
        done = subprocess.run(
            [sys.executable, "-c", script, real, target, residency, weights],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, (done.returncode, done.stderr)
        assert ("drawn" if residency == "all" else f"{weights.name}: truncated") in done.stdout

    @pytest.mark.parametrize("residency", ["all", "sequential"])
    def test_a_republished_bundle(self, real: Path, tmp_path: Path, target: str, residency: Any) -> None:
        """As publishing does it: the directories change places, and the old one goes."""
        other = self.other(tmp_path)
        with load(real, target=target, residency=residency) as pipe:
            expected = draw(pipe)
            os.rename(real, tmp_path / "old")
            os.rename(other, real)
            shutil.rmtree(tmp_path / "old")
            np.testing.assert_array_equal(draw(pipe), expected)
            pipe.close()
            np.testing.assert_array_equal(draw(pipe), expected)
        with load(real, target=target) as pipe:
            assert not np.array_equal(draw(pipe), expected)

    def test_descriptors_go_with_the_pipeline(self, real: Path, target: str) -> None:
        def opened() -> list[str]:
            return [file.path for file in psutil.Process().open_files() if file.path.startswith(str(real))]

        pipe = load(real, target=target)
        assert len(opened()) >= 2
        pipe.close()
        del pipe
        gc.collect()
        assert opened() == []


LIMITED = """
import resource, signal, sys
kind, size = sys.argv[1], int(sys.argv[2])
resource.setrlimit(getattr(resource, kind), (size, size))
from slipcast.cli.main import main
main(sys.argv[3:])
"""


def limited(kind: str, size: int, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process that may not write larger files, or use more memory."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(size), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


class TestResources:
    """Too little disk or memory is 5, said with what is needed; nothing truncated is left."""

    @pytest.mark.parametrize("existing", [False, True])
    def test_a_picture_that_does_not_fit(self, real: Path, tmp_path: Path, existing: bool) -> None:
        here = tmp_path / "here"
        here.mkdir()
        if existing:
            (here / "x.png").write_bytes(b"old")
        done = limited("RLIMIT_FSIZE", 64, "run", real, "--target", "onnxruntime", "-o", "x.png", "--json", cwd=here)
        assert done.returncode == 5, done.stderr
        error = json.loads(done.stdout)["error"]
        assert error["type"] == "ResourceError"
        assert error["message"].startswith("the disk is full: writing x.png, 0.0 MB")
        assert [path.name for path in here.iterdir()] == ["x.png"] * existing
        assert not existing or (here / "x.png").read_bytes() == b"old"

    def test_a_disk_that_is_too_full_is_seen_before_the_work(
        self, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from slipcast.cli.main import main

        monkeypatch.setattr("slipcast.engines.resources.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        monkeypatch.setattr("slipcast.run.pipeline.Pipeline.__call__", lambda *_, **__: pytest.fail("it was drawn"))
        with pytest.raises(SystemExit) as caught:
            main(["run", str(real), "--target", "onnxruntime", "-o", str(tmp_path / "x.png"), "--json"])
        assert caught.value.code == 5
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["message"] == "the pictures: the disk is too full"
        assert error["expected"] == "about 0.1 MB"
        assert error["got"].startswith("0.0 MB free in ")
        assert not (tmp_path / "x.png").exists()

    @pytest.mark.parametrize("mb", [350, 450, 600])
    @pytest.mark.parametrize("target", ENGINES)
    def test_a_memory_limit(self, real: Path, tmp_path: Path, target: str, mb: int) -> None:
        """Wherever it strikes, in Python, numpy, the linker or the library. (It may be enough, too.)"""
        done = limited("RLIMIT_AS", mb << 20, "run", real, "--target", target, "-o", "x.png", cwd=tmp_path)
        assert done.returncode in (0, 5), done.stderr
        if done.returncode:
            assert "memory ran out" in done.stderr
            assert "--residency sequential" in done.stderr
            assert not (tmp_path / "x.png").exists()
