"""Components that a pipeline changes for the time of a call are what they did then."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from test_refusals import Denoiser, Plain
from tiny import call_of, open_pipeline

from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.changed import States
from slipcast_compiler.capture.find import find_for
from slipcast_compiler.capture.program import Call
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.verify import verify


class Borrowing(Plain):
    """Its denoiser does something else while it is called."""

    def __call__(self, num_inference_steps: int = 5, generator: Any = None) -> dict[str, torch.Tensor]:
        usual, self.denoiser.inside = self.denoiser.inside, lambda x: x.tanh()
        try:
            return super().__call__(num_inference_steps, generator)
        finally:
            self.denoiser.inside = usual


def test_what_a_module_did_then_is_what_is_replayed() -> None:
    pipe = Borrowing(Denoiser(), DDIMScheduler())
    found = find_for(pipe, [lambda prompt: make_call(pipe, {}, prompt)])[0]
    calls = [event for event in found.program.events if isinstance(event, Call)]
    assert all(call.changed and call.inside for call in calls)
    verdict = verify(found.program, pipe, make_call(pipe, {}, seed=7), make_call(pipe, {}, seed=7))
    assert verdict.error == 0


def test_a_module_that_stays_what_it_is_has_its_own_code() -> None:
    pipe = Plain(Denoiser(), DDIMScheduler())
    found = find_for(pipe, [lambda prompt: make_call(pipe, {}, prompt)])[0]
    calls = [event for event in found.program.events if isinstance(event, Call)]
    assert all(call.inside is None and call.recorded and not call.changed for call in calls)


def test_hooks_and_attributes_make_a_state() -> None:
    states, module = States(), torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = states.of(module)
    assert states.of(module) == before
    handle = module[0].register_forward_hook(lambda *_: None)
    assert states.of(module) != before
    handle.remove()
    assert states.of(module) == before
    module[0].processor = object()
    assert states.of(module) != before


def test_other_attention_for_the_time_of_a_call() -> None:
    pipe = open_pipeline("perturbed_attention")
    program = capture(pipe, call_of("perturbed_attention", "a star", 1))
    assert {e.module for e in program.events if isinstance(e, Call) and e.changed} == {"unet"}
