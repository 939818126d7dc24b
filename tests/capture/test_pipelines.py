"""Programs of all tiny pipelines: replayed on other prompts, seeds and pictures they are the pipeline; loops roll."""

from __future__ import annotations

import pytest
from tiny import LENGTHS, PIPELINES, call_of, open_pipeline

from slipcast_compiler.capture.find import find_for
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.roll import roll
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
    verdict = verify(program, pipe, call_of(name, OTHER, 7), call_of(name, OTHER, 7))
    assert verdict.holds and verdict.error is not None and verdict.error < 1e-5 and verdict.difference is None


def test_a_number_that_is_read_from_the_prompt_is_found_with_its_line() -> None:
    pipe = open_pipeline("wan")  # which cuts embeddings at the mask's sum
    program = capture(pipe, call_of("wan", ONE, 1))
    verdict = verify(program, pipe, call_of("wan", OTHER, 7), call_of("wan", OTHER, 7))
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
