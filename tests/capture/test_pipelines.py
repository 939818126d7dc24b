"""Programs of all tiny pipelines: replayed on other prompts, seeds and pictures they are the pipeline; loops roll."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LENGTHS, PIPELINES, call_of, open_pipeline

from slipcast_compiler.capture.find import find_for
from slipcast_compiler.capture.generalise import without_insides
from slipcast_compiler.capture.program import Call, Ref, leaves, rebuild
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.replay import run
from slipcast_compiler.capture.roll import roll
from slipcast_compiler.capture.stand_ins import standing_in
from slipcast_compiler.capture.verify import verify

ONE, OTHER = "a small red circle on white", "a large blue star on a black background"
FAST = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "flux_fill")
# pipeline -> steps of each phase, operators and calls of its first step, and guidance
LOOPS = {
    "stable_diffusion": [(3, 6, "u + 7.5 (c - u)")],
    "stable_diffusion_xl": [(3, 7, "u + 5 (c - u)")],
    "stable_diffusion_3": [(3, 6, "u + 7 (c - u)")],
    "flux": [(3, 1, None)],
    "z_image": [(3, 10, "c + 5 (c - u)")],
    "wan_2_2": [(2, 5, "u + 5 (c - u)"), (4, 5, "u + 5 (c - u)")],
}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES]
)
def test_a_program_is_the_pipeline_for_another_prompt_and_seed(name: str) -> None:
    if name == "kolors":
        pytest.importorskip("sentencepiece")
    pipe = open_pipeline(name)
    if name in LENGTHS:
        program = find_for(pipe, [lambda prompt: call_of(name, prompt, 1)])[0].program
    else:
        program = capture(pipe, call_of(name, ONE, 1))
    for light in (False, True):  # as bundles have them: what goes for all lengths as it is, else calls alone
        each = without_insides(program) if light and name not in LENGTHS else program
        verdict = verify(each, pipe, call_of(name, OTHER, 7), call_of(name, OTHER, 7), light=light)
        assert verdict.holds and verdict.error is not None and verdict.error < 1e-5 and verdict.difference is None


def test_functions_take_the_places_of_modules() -> None:
    """None of a module's numbers are computed, and what it is given is told apart."""
    pipe = open_pipeline("stable_diffusion_3")
    program = without_insides(capture(pipe, call_of("stable_diffusion_3", ONE, 1)))
    components = {"transformer": pipe.transformer}
    called = next(event for event in program.events if isinstance(event, Call) and event.module == "transformer")
    computed = list[torch.Tensor]()
    pipe.transformer.proj_out.register_forward_hook(lambda _, __, out: computed.append(out))
    refs = [leaf for _, leaf in leaves((called.args, called.kwargs)) if isinstance(leaf, Ref)]
    numbers = {ref.id: program.specs[ref.id] for ref in refs}
    given = {number: torch.randn(shape).to(dtype) for number, (shape, dtype) in numbers.items()}
    found = []
    taken = inspect.signature(pipe.transformer.forward)
    with standing_in(replace(program, events=(called,)), components):
        assert inspect.signature(pipe.transformer.forward) == taken
        for number in (None, None, *given):
            values = dict(given)
            if number is not None:
                values[number] = values[number] + torch.linspace(0, 1, values[number].numel()).view_as(values[number])
            run(called, values, components, {})
            found.append(values[called.outputs[0][1]])
    assert torch.equal(found[0], found[1]) and tuple(found[0].shape) == program.specs[called.outputs[0][1]][0]
    assert all(float((other - found[0]).norm() / found[0].norm()) > 1e-3 for other in found[2:])
    assert len(found) > 4 and computed and all(each.is_meta for each in computed)
    computed.clear()
    run(called, dict(given), components, {})
    assert len(computed) == 1 and not computed[0].is_meta, "afterwards it computes again"


@pytest.mark.parametrize("change", [lambda t: t - 30, lambda t: t * 0.8])
@pytest.mark.parametrize("name", ["stable_diffusion_3", pytest.param("stable_diffusion_xl", marks=pytest.mark.slow)])
def test_another_number_that_a_module_is_given_is_seen(name: str, change: Callable[[Any], Any]) -> None:
    pipe = open_pipeline(name)
    program = without_insides(capture(pipe, call_of(name, ONE, 1)))

    def changed(event: Any) -> Any:
        if not isinstance(event, Call) or event.module not in ("transformer", "unet"):
            return event
        args, kwargs = rebuild(
            (event.args, event.kwargs), lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf
        )
        return replace(event, args=args, kwargs=kwargs)

    call = call_of(name, OTHER, 7), call_of(name, OTHER, 7)
    other = replace(program, events=tuple(map(changed, program.events)))
    assert [a is b for a, b in zip(other.events, program.events, strict=True)].count(False) == 3, "one a step"
    assert not verify(other, pipe, *call, light=True).holds
    assert verify(program, pipe, call_of(name, OTHER, 7), call_of(name, OTHER, 7), light=True).holds


class Parts(torch.nn.Module):  # type: ignore[misc]
    """Which a pipeline calls whole, and then a part of it; with a number that decides, and one that scales."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> Any:
        x = self.norm(self.linear(x)) * scale
        return (x + mask if float(timestep[0]) > 500 else x), x.argmax(-1)


def test_functions_know_what_modules_read() -> None:
    """Also where a module calls another that has one; of masks, numbers and integers."""
    module = Parts().eval()
    call = Call("parts", (), {}, ())
    empty: Any = SimpleNamespace(events=(call, replace(call, module="parts.norm")), needed_sources=())
    x, late, early = torch.randn(2, 4), torch.tensor([999.0]), torch.tensor([1.0])
    mask = torch.full((2, 4), torch.finfo(torch.float32).min)
    wanted = module(x, late, mask)[1]
    module.forward = own = module.forward  # as hooks of accelerate are put
    with torch.no_grad(), standing_in(empty, {"parts": module}):
        first, places = module(x, late, mask)
        assert torch.equal(places, wanted), "integers are computed"
        assert not torch.equal(module.norm(first), torch.nn.LayerNorm(4)(first)), "a function is in its place"
    assert module.forward is own
    del module.forward

    class Floats(Parts):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)[0]

    module = Floats().eval()
    with torch.no_grad(), standing_in(empty, {"parts": module}):
        found = [module(x, late, mask), module(x, early, mask), module(x, late, mask, scale=7.5), module(x, late, x)]
    assert all(torch.isfinite(each).all() for each in found)
    assert min(float((each - found[0]).norm() / found[0].norm()) for each in found[1:]) > 1e-2


@pytest.mark.parametrize("light", [False, True])
def test_a_number_that_is_read_from_the_prompt_is_found_with_its_line(light: bool) -> None:
    pipe = open_pipeline("wan")  # which cuts embeddings at the mask's sum
    program = without_insides(capture(pipe, call_of("wan", ONE, 1)))
    verdict = verify(program, pipe, call_of("wan", OTHER, 7), call_of("wan", OTHER, 7), light=light)
    assert verdict.error is not None and verdict.error > 1e-3 and not verdict.holds
    assert verdict.difference and "aten::slice at diffusers/pipelines/wan/pipeline_wan.py:" in verdict.difference
    assert {guard.operator for guard in program.guards} == {"_local_scalar_dense"}
    assert all("pipeline_wan.py:" in guard.where for guard in program.guards)


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_rolls(name: str) -> None:
    loop = roll(capture(open_pipeline(name), call_of(name, ONE, 1)))
    assert loop and loop.carried and all(sum(phase.table) > 0 for phase in loop.phases)
    found = [(len(phase.steps), len(phase.steps[0].events), phase.guidance) for phase in loop.phases]
    assert found == LOOPS[name]
