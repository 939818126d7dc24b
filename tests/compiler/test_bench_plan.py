"""What `slipcast bench` refuses, and what it says is missing, before anything runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from slipcast.engines import cuda
from slipcast.engines.cuda import Cuda, Gpu
from slipcast.errors import ArtifactError, HostError, RequestError
from slipcast_compiler.bench import peers, venvs
from slipcast_compiler.bench.peers import PEERS, how_to_install, interpreter
from slipcast_compiler.bench.plan import BUNDLE, Options, make_plan
from slipcast_compiler.bench.venvs import VENVS, Venv

SHAPES = Path("recipes/models/shapes").resolve()


def _absent(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    monkeypatch.setattr(peers, "_installed", lambda distribution: distribution not in absent)


def test_every_peer_names_a_side_an_environment_and_a_command() -> None:
    for name, peer in PEERS.items():
        assert (Path(peers.__file__).parent / "sides" / peer.side).is_file()
        assert peer.venv is None or peer.venv in VENVS
        assert peer.title
        assert peer.needs
        assert "install" in how_to_install(name)


def test_unknown_peers_are_answered_with_the_candidates(shapes_bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"(?s)unknown peer 'difusers'.*diffusers-bf16.*path of a bundle"):
        make_plan(shapes_bundle, Options(("difusers",)))


def test_the_checkpoint_has_to_be_named(shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="--model DIR"):
        make_plan(shapes_bundle, Options(("diffusers",)))
    monkeypatch.chdir(SHAPES.parents[1])  # the manifest says models/shapes
    assert make_plan(shapes_bundle, Options(("diffusers",))).checkpoint


def test_another_checkpoint_is_refused(shapes_bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(SHAPES, tmp_path / "shapes")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.013}))
    with pytest.raises(ArtifactError, match="not the checkpoint that the bundle was compiled from"):
        make_plan(shapes_bundle, Options(("diffusers",), other))


def test_missing_peers_are_named_and_the_rest_goes_on(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _absent(monkeypatch, "optimum-onnx")
    plan = make_plan(shapes_bundle, Options(("optimum-onnxruntime", "diffusers"), SHAPES, folder=tmp_path))
    assert [side.name for side in plan.sides] == [BUNDLE, "diffusers"]
    why = plan.missing["optimum-onnxruntime"]
    assert why["reason"] == "needs optimum-onnx and onnxruntime and diffusers"
    assert why["install"]
    assert "--make-venvs, or pip install 'optimum-onnx[onnxruntime]'" in why["install"]


def test_all_missing_is_an_error_of_the_host(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _absent(monkeypatch, "torch", "optimum-intel")
    options = Options(("diffusers", "optimum-openvino"), SHAPES, folder=tmp_path)
    with pytest.raises(HostError, match=r"(?s)diffusers: needs torch.*slipcast\[compiler\].*optimum") as caught:
        make_plan(shapes_bundle, options)
    assert caught.value.exit_code == 3


def test_torch_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert interpreter(PEERS["torch-compile"], tmp_path) is None
    assert "g++" in how_to_install("torch-compile")


def test_a_peer_for_gpus_needs_one(shapes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(("torch-compile-cuda", "diffusers"), SHAPES)
    monkeypatch.setattr(cuda, "look", lambda: Cuda(problem="no CUDA device (why)"))
    assert (
        make_plan(shapes_bundle, options).missing["torch-compile-cuda"]["reason"] == "needs a GPU: no CUDA device (why)"
    )
    monkeypatch.setattr(cuda, "look", lambda: Cuda((Gpu("Some GPU", "8.9", 10**10),), "13.0"))
    plan = make_plan(shapes_bundle, options)
    assert plan.missing == {}
    assert (plan.sides[1].job["dtype"], plan.sides[1].job["device"]) == ("bfloat16", "cuda")


def test_a_bundle_alone_needs_no_checkpoint(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _absent(monkeypatch, "torch")
    for against in ((), (str(shapes_bundle),)):
        plan = make_plan(shapes_bundle, Options(against))
        assert plan.checkpoint is None
        assert plan.reference is None
        assert plan.no_quality


def test_same_prompts_and_seeds_for_all(shapes_bundle: Path) -> None:
    plan = make_plan(shapes_bundle, Options(steps=3))
    prompts, seeds = plan.requests(0, 7)
    assert prompts[:2] == ["a large yellow circle on a beige background", "a large green circle on a beige background"]
    assert prompts[5] == prompts[0], "the bundle was judged on five"
    assert seeds == list(range(1000, 1007))
    assert plan.sampling.steps == 3


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "images"), [("ddpm1000", "ddpm", 1000, 2), ("ddim50", "ddim", 50, 4)]
)
def test_slow_peers_keep_their_steps_and_make_few_images(
    shapes_bundle: Path, name: str, sampler: str, steps: int, images: int
) -> None:
    plan = make_plan(shapes_bundle, Options((name,), SHAPES, steps=3))
    peer = plan.sides[1]
    assert peer.images == images
    assert (peer.job["sampling"]["sampler"], peer.job["sampling"]["steps"]) == (sampler, steps)
    assert plan.reference
    assert plan.reference.job["sampling"]["steps"] == 3


def test_steps_that_cannot_be(shapes_bundle: Path) -> None:
    with pytest.raises(RequestError):
        make_plan(shapes_bundle, Options(steps=5000))


def test_an_environment_is_made_once_and_again_when_its_packages_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(venvs, "_run", lambda command, folder: (commands.append(command), folder.mkdir(exist_ok=True)))
    folder, venv = tmp_path / "peer", Venv(("peer==1",), ("torch==2",), ("torchvision",))
    assert venv.python(folder) is None
    venvs.make(venv, folder)
    made = len(commands)
    assert any("peer==1" in command and "-c" in command for command in commands)
    assert commands[-1][-2:] == ["--yes", "torchvision"]
    venvs.make(venv, folder)
    assert len(commands) == made
    assert venv.python(folder) == folder / "bin" / "python"
    assert Venv(("peer==2",)).python(folder) is None


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be made"):
        venvs._run([sys.executable, "-c", "raise SystemExit('no such package')"], tmp_path)


def test_own_environment_comes_before_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def available(self: Any, folder: Path) -> Path:
        return folder / "bin" / "python"

    monkeypatch.setattr(Venv, "python", available)
    assert interpreter(PEERS["optimum-openvino"], tmp_path) == str(tmp_path / "optimum-openvino" / "bin" / "python")
