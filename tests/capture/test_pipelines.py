"""Programs of all tiny pipelines: replayed on other prompts, seeds and pictures they are the pipeline; loops roll."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import LENGTHS, PIPELINES, call_of, open_pipeline

from slipcast_compiler.capture.find import find_for
from slipcast_compiler.capture.generalise import without_insides
from slipcast_compiler.capture.program import Call, Ref, leaves
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
    for light in (False, True):
        each = without_insides(program) if light else program
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
    with standing_in(replace(program, events=(called,)), components):
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
