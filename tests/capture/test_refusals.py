"""Pipelines that a program cannot follow: each is refused in words, with the line of its code."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from conftest import call_cli
from slipcast.errors import RecipeError
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.open import open_without_weights
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.roll import roll

HERE = Path(__file__).name


class Denoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A model of the user's own. `inside`: what it does besides."""

    @register_to_config
    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(channels))
        self.inside: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x @ self.weight)


class Plain(DiffusionPipeline):  # type: ignore[misc]
    """Denoises three numbers of two channels."""

    def __init__(self, denoiser: Denoiser, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output * 2

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 5, generator: Any = None) -> dict[str, torch.Tensor]:
        x = torch.randn(3, 2, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, time in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(self.change(self.denoiser(x), step), time, x).prev_sample
        return {"x": x}


class Branching(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output * 2 if output.mean() > 0 else output


class ReadingAWeight(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output * float(self.denoiser.weight[0, 0])


class ToNumpy(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return torch.from_numpy(output.numpy() * 2)


class Listing(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return torch.tensor(output.tolist())


class Restless(Plain):
    """Does more at each step."""

    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        for _ in range(step + 1):
            output = output.sin()
        return output


class Choosing(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output + torch.multinomial(output.softmax(-1), 1)


class Framewise(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output[:1] + torch.tensor([[1.0], [2.0], [3.0]]) * (output - output[:1])


class Alternating(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        return output.sin() if step % 2 else output


class Asking(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        urllib.request.urlopen("http://127.0.0.1:9/scale")
        return output


class AskingByName(Plain):
    def change(self, output: torch.Tensor, step: int) -> torch.Tensor:
        socket.create_connection(("localhost", 9))
        return output


class Silent(Plain):
    def __call__(self, num_inference_steps: int = 5, generator: Any = None) -> dict[str, Any]:  # type: ignore[override]
        super().__call__(num_inference_steps, generator)
        return {"x": "done"}


def _line(text: str) -> str:
    """File and number of the first line here that contains this."""
    lines = Path(__file__).read_text().splitlines()
    return f"{HERE}:{next(number for number, line in enumerate(lines, 1) if text in line)}"


def _made(kind: Any, inside: Any = None) -> Any:
    pipe = kind(Denoiser(), DDIMScheduler())
    if inside:
        pipe.denoiser.inside = inside
    return pipe


def _refused(kind: Any, inside: Any = None) -> RecipeError:
    pipe = _made(kind, inside)
    with pytest.raises(RecipeError) as caught:
        roll(capture(pipe, make_call(pipe, {"num_inference_steps": 5})))
    assert caught.value.expected and caught.value.got and caught.value.exit_code == 2
    return caught.value


def test_the_plain_pipeline_rolls() -> None:
    pipe = _made(Plain)
    loop = roll(capture(pipe, make_call(pipe, {})))
    assert loop and len(loop.phases) == 1 and loop.phases[0].ending.startswith("aten::mul at ")


@pytest.mark.parametrize(
    ("kind", "operator", "code"),
    [
        (Branching, "_local_scalar_dense", "if output.mean() > 0"),
        (ReadingAWeight, "_local_scalar_dense", "float(self.denoiser.weight"),
        (ToNumpy, "numpy", "output.numpy()"),
        (Listing, "tolist", "output.tolist()"),
    ],
)
def test_a_number_that_the_weights_give(kind: Any, operator: str, code: str) -> None:
    refusal = _refused(kind)
    assert kind.__name__ in str(refusal) and "reads a number into Python" in str(refusal)
    assert operator in str(refusal.got) and _line(code) in str(refusal.got)


@pytest.mark.parametrize("kind", [Asking, AskingByName])
def test_the_network(kind: Any) -> None:
    refusal = _refused(kind)
    code = "urllib.request.urlopen(" if kind is Asking else "socket.create_connection("
    assert "calls the network" in str(refusal) and _line(code) in str(refusal.got)


def test_random_numbers_inside_a_component() -> None:
    refusal = _refused(Plain, lambda x: x + torch.randn_like(x))
    assert "component denoiser fails: it draws random numbers" in str(refusal) and "aten::randn_like at " in str(
        refusal.got
    )
    assert _line("torch.randn_like(x))") in str(refusal.got)


def test_a_component_that_reads_what_it_computes() -> None:
    refusal = _refused(Plain, lambda x: x[: int(x.argmax())])
    assert "its component denoiser reads numbers that it computes" in str(refusal)
    assert _line("int(x.argmax())") in str(refusal.got)


def test_draws_from_probabilities() -> None:
    refusal = _refused(Choosing)
    assert "draws from probabilities that it computes" in str(refusal)
    assert "aten::multinomial at " in str(refusal.got) and _line("torch.multinomial(") in str(refusal.got)


def test_guidance_of_its_own_for_each_frame() -> None:
    pipe = _made(Framewise)
    loop = roll(capture(pipe, make_call(pipe, {})))
    assert loop and loop.phases[0].guidance is None and loop.phases[0].ending.startswith("aten::add at ")


def test_a_component_that_may_read_constants() -> None:
    """Of any number of dimensions: what a constant is like is the same for every prompt."""
    pipe = _made(Plain, lambda x: x * 2 if bool((torch.ones(1, 3, 2) == 1).all()) else x)
    assert len(capture(pipe, make_call(pipe, {})).marks) == 3


def test_a_component_that_raises() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such width")

    refusal = _refused(Plain, fails)
    assert "its component denoiser fails" in str(refusal) and "ValueError at " in str(refusal.got)
    assert _line('raise ValueError("no such') in str(refusal.got) and "no such width" in str(refusal.got)


def test_steps_that_change_without_a_pattern() -> None:
    refusal = _refused(Restless)
    assert "5 forms in 5 steps: ABCDE" in str(refusal.got) and _line("output = output.sin()") in str(refusal.got)


def test_forms_that_come_back_are_phases() -> None:
    pipe = _made(Alternating)
    loop = roll(capture(pipe, make_call(pipe, {"num_inference_steps": 4})))
    assert loop and [(phase.first, len(phase.steps)) for phase in loop.phases] == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_a_pipeline_that_returns_no_tensor() -> None:
    assert "returns nothing that a program gives" in str(_refused(Silent))


def _save(pipe: Any, folder: Path) -> None:
    pipe.denoiser.save_pretrained(folder / "denoiser")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": type(pipe).__name__,
        "denoiser": ["my_denoiser", "Denoiser"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def test_the_command_ends_with_the_refusals_code(tmp_path: Path) -> None:
    _save(_made(Branching), tmp_path)
    done = call_cli("capture", str(tmp_path), "--pipeline", f"{Path(__file__).stem}:Branching")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "reads a number into Python" in done.stderr and _line("if output.mean() > 0") in done.stderr


def test_a_pipeline_with_a_model_of_its_own_module(tmp_path: Path) -> None:
    _save(_made(Plain), tmp_path)
    done = call_cli("capture", str(tmp_path), "--pipeline", f"{Path(__file__).stem}:Plain", "--json")
    summary = json.loads(done.stdout)
    denoiser = summary["components"]["denoiser"]
    assert [denoiser[key] for key in ("parameters", "calls", "part")] == [4, 3, "denoiser"]
    assert denoiser["layers"]["heads"] == 0


def test_the_users_own_module_lies_where_the_command_runs(tmp_path: Path) -> None:
    (tmp_path / "own_pipelines.py").write_text(f"from {Path(__file__).stem} import Denoiser, Plain\n")
    _save(_made(Plain), tmp_path)
    done = call_cli("capture", str(tmp_path), "--pipeline", "own_pipelines:Plain", cwd=tmp_path)
    assert done.returncode == 0 and "loop: 3 steps of one form" in done.stdout


def test_a_class_that_the_library_does_not_have(tmp_path: Path) -> None:
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "NoSuchModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match="unet is of a class that the installed diffusers does not have") as refused:
        open_without_weights(tmp_path)
    assert refused.value.got == "NoSuchModel" and refused.value.hint


def test_code_of_a_checkpoint_is_not_asked_about(tmp_path: Path) -> None:
    """A tokenizer that names code of its own: nothing runs, and nobody is asked."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    own = {"auto_map": {"AutoTokenizer": ["my_tokenizer.Mine", None]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine"}))
    (folder / "my_tokenizer.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    index = {"_class_name": "DDPMPipeline", "tokenizer": ["transformers", "AutoTokenizer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(Exception, match="no AutoTokenizer can be made"):
        open_without_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
