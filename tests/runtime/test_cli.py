"""The command line: exit codes, one JSON document, one message per error, and the files it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import fakes
import numpy as np
import pytest
from fakes import Fakes, write_fake
from PIL import Image

import slipcast
from conftest import run_cli
from slipcast.cli.main import main
from slipcast.run.saving import make_grid

PROMPT = ("--prompt", "a red circle", "--seed", "7")
PIXELS = fakes.SIZE * fakes.FACTOR


class Cli:
    """main() in this process; keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str | Path) -> int:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.err + self.out
        assert isinstance(stop.value.code, int)
        return stop.value.code

    @property
    def json(self) -> Any:
        """The only document on stdout: anything beside it would not parse."""
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_fake(tmp_path / "bundle")


class TestRun:
    @pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (8, 3, 3)])
    def test_one_file_is_a_grid(
        self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path, count: int, columns: int, rows: int
    ) -> None:
        target = tmp_path / "new" / "grid.png"
        assert cli("run", bundle, *PROMPT, "--num-images", str(count), "-o", target) == 0
        assert cli.out == f"{target}\n"
        with Image.open(target) as picture:
            assert picture.size == (columns * (PIXELS + 2) - 2, rows * (PIXELS + 2) - 2)
            first = slipcast.load(bundle)("a red circle", seed=7).images[0]
            np.testing.assert_array_equal(np.asarray(picture)[:PIXELS, :PIXELS], np.asarray(first))

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_directory_gets_one_file_per_seed(
        self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path, exists: bool
    ) -> None:
        folder = tmp_path / "pictures"
        if exists:
            folder.mkdir()
        assert cli("run", bundle, *PROMPT, "--num-images", "3", "-o", folder, "--json") == 0
        assert sorted(path.name for path in folder.iterdir()) == ["7.png", "8.png", "9.png"]
        assert cli.json["files"] == [str(folder / f"{seed}.png") for seed in (7, 8, 9)]
        assert cli.json["seeds"] == [7, 8, 9]
        assert cli.json["target"] == "openvino-cpu-bf16"
        assert set(cli.json["seconds"]) == {"text_encoder", "denoiser", "vae_decoder", "total"}
        with Image.open(folder / "9.png") as picture:
            alone = slipcast.load(bundle)("a red circle", seed=9).images[0]
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(alone))

    def test_without_output_it_is_named_by_bundle_and_seed(
        self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cwd").mkdir()
        monkeypatch.chdir(tmp_path / "cwd")
        assert cli("run", bundle, *PROMPT) == 0
        assert cli.out == "fake-7.png\n"
        assert cli("run", bundle, "--prompt", "x", "--json") == 0
        (seed,) = cli.json["seeds"]
        assert sorted(path.name for path in Path().iterdir()) == sorted(["fake-7.png", f"fake-{seed}.png"])

    def test_options_reach_the_pipeline(self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path) -> None:
        options = ("--steps", "3", "--guidance-scale", "1", "--target", "onnxruntime", "--residency", "sequential")
        assert cli("run", bundle, *PROMPT, *options, "-o", tmp_path / "x.png", "--json") == 0
        assert cli.json["target"] == "onnxruntime-cpu-fp32"
        assert engines.count("denoiser") == 3
        assert all(len(given.sample) == 1 for name, given in engines.calls if name == "denoiser")
        assert engines.most_open == 1
        plain = (tmp_path / "x.png").read_bytes()
        assert cli("run", bundle, *PROMPT, "--negative-prompt", "blue", "-o", tmp_path / "y.png") == 0
        assert cli("run", bundle, *PROMPT, "-o", tmp_path / "z.png") == 0
        assert len({plain, (tmp_path / "y.png").read_bytes(), (tmp_path / "z.png").read_bytes()}) == 3

    def test_a_prompt_is_needed(self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path) -> None:
        assert cli("run", bundle, "-o", tmp_path / "x.png", "--json") == 2
        assert "--prompt is missing" in cli.err
        assert "--prompt is missing" in cli.json["error"]["message"]
        assert engines.opened == []

    @pytest.mark.parametrize(
        "output", ["x.nope", "x.py", "file.txt/x.png", "file.txt/folder", "/proc/1/nothing/x.png", "x.mpg"]
    )
    def test_an_output_that_cannot_be_written_is_refused_before_the_work(
        self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path, output: str
    ) -> None:
        (tmp_path / "file.txt").write_text("")
        assert cli("run", bundle, *PROMPT, "-o", tmp_path / output, "--json") == 2
        assert f"cannot write {tmp_path / output}" in cli.err
        assert "cannot write" in cli.json["error"]["message"]
        assert engines.opened == []

    def test_an_output_that_turns_out_not_to_be_writable(
        self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        assert cli("run", bundle, *PROMPT, "-o", tmp_path / "x.png", "--json") == 2
        assert "No space left on device" in cli.json["error"]["message"]
        assert not (tmp_path / "x.png").exists()


def interrupt() -> None:
    raise KeyboardInterrupt


def fail_with(error: BaseException) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


class TestErrors:
    """One message, the right code, and with --json one document."""

    def check(self, cli: Cli, code: int, *arguments: str | Path, says: str) -> None:
        assert cli(*arguments) == code
        assert cli.out == ""
        assert re.search(says, cli.err), cli.err
        assert cli(*arguments, "--json") == code
        assert re.search(says, cli.err), cli.err
        assert cli.json["exit_code"] == code
        assert cli.json["error"]["message"]

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--steps", "0"), "num_inference_steps.*\n.*integer from 1 to 998"),
            (("--steps", "many"), "'many' is not a valid integer"),
            (("--seed", "-1"), "seed is not usable"),
            (("--seed", str(2**64)), "seed is not usable"),
            (("--guidance-scale", "nan"), "guidance_scale.*\n.*a number from 0 to 1000"),
            (("--num-images", "0"), "num_images_per_prompt"),
            (("--target", "abacus"), "no target 'abacus'(.|\n)*openvino-cpu-bf16, onnxruntime-cpu-fp32"),
            (("--residency", "none"), "unknown residency 'none'(.|\n)*such as 4GB"),
            (("--prompt", "a " * 40, "--on-long-prompt", "error"), "longer than 12 tokens; dropped"),
            (("--prompt", "\udcff"), "lone surrogate"),
            (("--nonsense",), "No such option"),
        ],
        ids=lambda value: " ".join(value)[:30].encode("ascii", "replace").decode() if isinstance(value, tuple) else "",
    )
    def test_usage_2(self, cli: Cli, engines: Fakes, bundle: Path, options: tuple[str, ...], says: str) -> None:
        self.check(cli, 2, "run", bundle, *PROMPT, *options, says=says)
        assert engines.calls == []

    def test_no_bundle_given_2(self, cli: Cli) -> None:
        self.check(cli, 2, "run", says="Missing argument 'BUNDLE'")
        self.check(cli, 2, "transmogrify", says="No such command 'transmogrify'")

    @pytest.mark.parametrize("command", ["run", "inspect", "verify", "report", "doctor"])
    def test_damaged_4(self, cli: Cli, engines: Fakes, tmp_path: Path, bundle: Path, command: str) -> None:
        options = PROMPT if command == "run" else ()
        self.check(cli, 4, command, tmp_path / "missing", *options, says="missing: cannot be opened")
        (bundle / "denoiser.bin").write_text("short")
        self.check(cli, 4, command, bundle, *options, says=r"denoiser.bin: truncated\n.*12 bytes\n.*5 bytes")
        assert engines.opened == []

    def test_details_of_an_error(self, cli: Cli, tmp_path: Path) -> None:
        cli("inspect", tmp_path, "--json")
        error = cli.json["error"]
        assert set(error) == {"message", "type", "expected", "got", "hint"}
        assert error["type"] == "ArtifactError"
        for text in (error["message"], error["expected"], error["got"], error["hint"]):
            assert text in cli.err

    def test_missing_engine_3(self, cli: Cli, engines: Fakes, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("slipcast.engines.EngineKind.available", lambda kind: kind.library != "openvino")
        says = r"pip install 'slipcast\[openvino\]'"
        self.check(cli, 3, "run", bundle, *PROMPT, "--target", "openvino", says=says)

    def test_numbers_that_are_none_1(self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path) -> None:
        engines.functions["denoiser"] = lambda arrays: {"prediction": np.full_like(arrays["sample"], np.nan)}
        self.check(cli, 1, "run", bundle, *PROMPT, "-o", tmp_path / "x.png", says="not finite after step 1 of 6")
        assert not (tmp_path / "x.png").exists()

    def test_out_of_memory_5(self, cli: Cli, engines: Fakes, bundle: Path) -> None:
        engines.functions["denoiser"] = fail_with(MemoryError())
        self.check(cli, 5, "run", bundle, *PROMPT, says="MemoryError(.|\n)*free some memory")

    def test_an_error_nobody_foresaw_is_one_message_too(self, cli: Cli, engines: Fakes, bundle: Path) -> None:
        engines.functions["denoiser"] = fail_with(RuntimeError("the device is on fire"))
        self.check(cli, 1, "run", bundle, *PROMPT, says="RuntimeError: the device is on fire(.|\n)*--debug")

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("error", [RuntimeError("fire"), slipcast.HostError("no device")])
    def test_debug_shows_the_traceback_and_keeps_the_exit_code(
        self, engines: Fakes, bundle: Path, error: Exception, first: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        error.add_note("from another process")
        engines.functions["denoiser"] = fail_with(error)
        command = ["run", str(bundle), *PROMPT]
        with pytest.raises(SystemExit) as caught:
            main(["--debug", *command] if first else [*command, "--debug"])
        assert caught.value.code == getattr(error, "exit_code", 1)
        printed = capsys.readouterr().err
        assert "Traceback" in printed
        assert "from another process" in printed

    @pytest.mark.parametrize("arguments", [("inspect", "missing", "--json"), ("inspect", "bundle")])
    def test_a_full_stdout(self, bundle: Path, arguments: tuple[str, ...]) -> None:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "slipcast.cli.main", *arguments],
                cwd=bundle.parent, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == (4 if "missing" in arguments else 5)
        assert "Traceback" not in done.stderr
        assert done.stderr.count("rror: ") <= 2

    def test_interrupted_130(self, cli: Cli, engines: Fakes, bundle: Path) -> None:
        engines.functions["denoiser"] = fail_with(KeyboardInterrupt())
        self.check(cli, 130, "run", bundle, *PROMPT, says="interrupted$")

    def test_an_interrupted_compile_says_how_to_go_on(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "slipcast.cli.main.Commands.get_command", lambda *_: click.Command("compile", callback=interrupt)
        )
        assert cli("compile") == 130
        assert "the same command goes on from the cache" in cli.err

    def test_compiler_that_is_not_installed_3(self) -> None:
        """In a process of its own, where torch cannot be imported."""
        code = "import sys; sys.modules['torch'] = None\nfrom slipcast.cli.main import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, "compile", "recipes/shapes-circles.toml", "--json"],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "pip install 'slipcast[compiler]'" in done.stderr
        assert json.loads(done.stdout)["exit_code"] == 3
        assert "Traceback" not in done.stderr


class TestOtherCommands:
    def test_help_lists_them_all(self, cli: Cli) -> None:
        assert cli("--help") == 0
        listed = re.findall(r"^  (\w+) ", cli.out.partition("Commands:")[2], re.MULTILINE)
        assert {"run", "inspect", "verify", "doctor", "report", "completion", "compile", "init"} <= set(listed)

    @pytest.mark.parametrize("command", ["run", "inspect", "verify", "doctor", "report", "completion"])
    def test_each_has_help(self, cli: Cli, command: str) -> None:
        assert cli(command, "--help") == 0
        assert f"Usage: slipcast {command}" in cli.out

    def test_version(self, cli: Cli) -> None:
        assert cli("--version") == 0
        assert cli.out == f"slipcast, version {slipcast.__version__}\n"

    @pytest.mark.parametrize(("shell", "word"), [("bash", "complete "), ("zsh", "#compdef"), ("fish", "complete ")])
    def test_completion(self, cli: Cli, shell: str, word: str) -> None:
        assert cli("completion", shell) == 0
        assert word in cli.out
        assert "_SLIPCAST_COMPLETE" in cli.out

    def test_completion_for_another_shell(self, cli: Cli) -> None:
        assert cli("completion", "cmd") == 2
        assert "'bash', 'zsh', 'fish'" in cli.err

    def test_inspect(self, cli: Cli, bundle: Path) -> None:
        (bundle / "denoiser.bin").write_text("DENOISER.BIN")  # not hashed here
        assert cli("inspect", bundle) == 0
        for part in ("fake  (schema 1.0", "16x16, latent 4x8x8", "dpmpp_2m, 6 steps, leading, guidance 3",
                     "<- context float32[b, 12, 5]", "target onnxruntime-cpu-fp32"):  # fmt: skip
            assert part in cli.out
        assert cli("inspect", bundle, "--json") == 0
        assert cli.json["components"].keys() == set(fakes.COMPONENTS)
        assert cli.json["name"] == "fake"

    def test_verify(self, cli: Cli, bundle: Path) -> None:
        assert cli("verify", bundle) == 0
        assert re.fullmatch(r"ok: 13 files, 0\.0 MB\n", cli.out)
        assert cli("verify", bundle, "--json") == 0
        assert cli.json == {"ok": True, "files": 13, "bytes": sum(f.stat().st_size for f in bundle.glob("[!m]*"))}

    def test_verify_names_the_file_with_a_flipped_bit(self, cli: Cli, bundle: Path) -> None:
        (bundle / "vae_decoder.bin").write_bytes(b"vae_decoder.biN")
        assert cli("verify", bundle, "--json") == 4
        assert cli.json["error"]["message"].startswith("vae_decoder.bin: content differs")
        assert cli.json["error"]["expected"] != cli.json["error"]["got"]

    def test_unlisted_files(self, cli: Cli, engines: Fakes, bundle: Path) -> None:
        (bundle / "notes.txt").write_text("x")
        assert cli("verify", bundle) == 4
        assert "notes.txt" in cli.err
        assert cli("verify", bundle, "--allow-unlisted") == 0
        assert cli("inspect", bundle) == 4
        assert cli("inspect", bundle, "--allow-unlisted") == 0
        assert cli("report", bundle, "--allow-unlisted") == 4
        assert "holds no report" in cli.err
        assert cli("run", bundle, *PROMPT) == 4
        assert cli("run", bundle, *PROMPT, "--allow-unlisted", "-o", bundle.parent / "x.png") == 0

    def test_report_of_a_bundle_without_one(self, cli: Cli, bundle: Path) -> None:
        assert cli("report", bundle, "--json") == 4
        assert cli.json["error"]["message"].endswith("holds no report")

    def test_doctor(self, cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cli("doctor") == 0
        assert re.search(r"^ok +slipcast +\S+ on Python 3", cli.out, re.MULTILINE)
        assert cli("doctor", bundle, "--json") == 0
        findings = {finding["name"]: finding for finding in cli.json["findings"]}
        assert {"processor", "memory", "disk", "openvino", "onnxruntime", "compiler"} <= findings.keys()
        assert findings["target onnxruntime-cpu-fp32"]["detail"] == "runs here (structure checked, digests not)"
        assert cli.json["ok"] is True
        monkeypatch.setattr("slipcast.engines.EngineKind.available", lambda kind: False)
        assert cli("doctor", bundle) == 3
        assert re.search(r"^BAD .*none of its targets runs here", cli.out, re.MULTILINE)
        assert "does not run here: openvino is not installed: pip install" in cli.out

    def test_doctor_sees_two_onnxruntimes(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("slipcast.cli.doctor._version", lambda name: "1.0")
        assert cli("doctor", "--json") == 3
        (bad,) = (finding for finding in cli.json["findings"] if not finding["ok"])
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in bad["detail"]


class TestGrid:
    @pytest.mark.parametrize(
        ("count", "size"), [(1, (8, 6)), (2, (18, 6)), (3, (18, 14)), (4, (18, 14)), (5, (28, 14)), (9, (28, 22))]
    )
    def test_size_and_places(self, count: int, size: tuple[int, int]) -> None:
        images = [Image.new("RGB", (8, 6), (10 * i + 1, 0, 0)) for i in range(count)]
        grid = make_grid(images)
        assert grid.size == size
        columns = (size[0] + 2) // 10
        for i in range(count):
            assert grid.getpixel((i % columns * 10 + 7, i // columns * 8 + 5)) == (10 * i + 1, 0, 0)
        if count > 1:
            assert grid.getpixel((8, 0)) == (255, 255, 255)

    def test_grey(self) -> None:
        assert make_grid([Image.new("L", (4, 4))] * 2).mode == "L"


class TestAsAProcess:
    """The command as a user starts it, on a compiled bundle."""

    def test_run(self, shapes_bundle: Path, tmp_path: Path) -> None:
        done = run_cli("run", str(shapes_bundle), *PROMPT, "--steps", "2", "--json", "-o", "p/x.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert record["files"] == [os.path.join("p", "x.png")]
        with Image.open(tmp_path / "p" / "x.png") as picture:
            assert picture.size == (64, 64)
        assert "target openvino-cpu-bf16" in done.stderr

    def test_inspect_and_report(self, shapes_bundle: Path, tmp_path: Path) -> None:
        shown = run_cli("inspect", str(shapes_bundle), cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert "family       shapes-circles, open, 64 + 16 prompts" in shown.stdout
        told = run_cli("report", str(shapes_bundle), cwd=tmp_path)
        assert told.returncode == 0, told.stderr
        assert "onnxruntime-cpu-fp32: CLIP" in told.stdout
        for part in ("% to ", "5 images", "FLIP 0.0", "noise floor", "LPIPS not run", "out of the family: CLIP"):
            assert part in told.stdout, part
        assert "report.html" in told.stdout
        record = run_cli("report", str(shapes_bundle), "--json", cwd=tmp_path)
        assert isinstance(json.loads(record.stdout), dict)

    def test_verify_a_flipped_bit(self, shapes_bundle: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(shapes_bundle, tmp_path / "copy"))
        assert run_cli("verify", str(copy)).returncode == 0
        weights = copy / "onnxruntime-fp32" / "denoiser.onnx.data"
        with weights.open("r+b") as file:
            file.seek(1_000_000)
            byte = file.read(1)[0]
            file.seek(1_000_000)
            file.write(bytes([byte ^ 1]))
        done = run_cli("verify", str(copy))
        assert done.returncode == 4
        assert "onnxruntime-fp32/denoiser.onnx.data: content differs" in done.stderr
        assert len(re.findall(r"sha256 [0-9a-f]{64}", done.stderr)) == 2
        assert (done.stdout, "Traceback" in done.stderr) == ("", False)

    @pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
    def test_interrupt(self, shapes_bundle: Path, tmp_path: Path, by: signal.Signals) -> None:
        command = [sys.executable, "-m", "slipcast.cli.main", "run", str(shapes_bundle), *PROMPT]
        running = subprocess.Popen(
            [*command, "--steps", "900", "--num-images", "4", "-o", str(tmp_path / "x.png")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
        try:
            assert running.stderr
            for line in running.stderr:
                if line.startswith("sample on"):
                    break
            running.send_signal(by)
            out, err = running.communicate(timeout=30)
        finally:
            running.kill()
        assert running.returncode == 130
        assert "interrupted" in err
        assert "Traceback" not in err
        assert out == ""
        assert list(tmp_path.iterdir()) == []
