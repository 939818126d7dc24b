"""Tokens that the pipeline's own code pads to a multiple of some number: a tokenizer can do that by itself.

So the number of tokens that a program sees is the padded one, which its sizes follow; they do not follow the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from slipcast_compiler.capture.program import Op, Padding, Program, Ref, Source, outputs_of, refs


def pad_sources(programs: Sequence[Program]) -> list[Program]:
    """The programs, of captures for several lengths, with padded sources in place of sources that are padded."""
    found = list(programs)
    for sources in zip(*(program.needed_sources for program in programs), strict=False):
        padding = _find_padding(programs, sources)
        if padding:
            found = [_padded(program, source, padding) for program, source in zip(found, sources, strict=True)]
    return found


def _find_padding(programs: Sequence[Program], sources: Sequence[Source]) -> Padding | None:
    """What explains how all of these are padded; None where they are not, or where several numbers would."""
    pairs = list(zip(programs, sources, strict=True))
    if len({source.value.shape for source in sources}) == 1 or not all(_is_alone(*pair) for pair in pairs):
        return None
    pads = [pad for pair in pairs if (pad := _find_pad(*pair))]
    if not pads:
        return None
    _, tokens, left = pads[0]
    sizes = [_padded_size(*pair) for pair in pairs]
    explaining = [
        padding
        for multiple in range(2, max(sizes) + 1)
        if (padding := Padding(multiple, int(tokens.flatten()[0]), left))
        and [padding(source.value).shape[1] for source in sources] == sizes
    ]
    alike = all(torch.equal(program_tokens, tokens.flatten()[0].expand_as(program_tokens)) for _, program_tokens, _ in pads)
    return explaining[0] if len(explaining) == 1 and alike and all(pad[2] == left for pad in pads) else None


def _is_alone(program: Program, source: Source) -> bool:
    """Whether it is text of which nothing else that the tokenizer gave is used, such as a mask that would be padded."""
    of_call = [each for each in program.needed_sources if each.tokenized is source.tokenized]
    return source.kind == "prompt" and source.tokenized is not None and source.value.ndim == 2 and len(of_call) == 1


def _find_pad(program: Program, source: Source) -> tuple[int, torch.Tensor, bool] | None:
    """The place of the event that puts constant tokens beside a source, these, and whether they come first; None where
    the source is used otherwise."""
    reading = [place for place in program.needed if Ref(source.id) in refs(_given(program.events[place]))]
    event = program.events[reading[0]] if len(reading) == 1 else None
    if not isinstance(event, Op) or event.function is not torch.ops.aten.cat.default or event.args[1:] not in ((1,), (-1,)):
        return None
    match event.args[0]:
        case [torch.Tensor() as tokens, Ref()]:
            return reading[0], tokens, True
        case [Ref(), torch.Tensor() as tokens]:
            return reading[0], tokens, False
    return None


def _given(event: Any) -> Any:
    return event.args, event.kwargs


def _padded_size(program: Program, source: Source) -> int:
    pad = _find_pad(program, source)
    return int(source.value.shape[1] + (pad[1].shape[1] if pad else 0))


def _padded(program: Program, source: Source, padding: Padding) -> Program:
    """The program without the event that pads, if it has it."""
    pad, value, events = _find_pad(program, source), source.id, list(program.events)
    memory, specs = dict(program.memory), dict(program.specs)
    if pad:  # what it gives is a source now; it stays in its place, for nobody
        (value,) = outputs_of(events[pad[0]])
        unread = max(memory) + 1
        memory[unread], specs[unread] = max(memory.values()) + 1, specs[value]
        events[pad[0]] = replace(events[pad[0]], outputs=(unread,))
    made = replace(source, id=value, value=padding(source.value), padding=padding)
    sources = tuple(made if each.id == source.id else each for each in program.sources)
    if pad:
        sources += (source,)
    return replace(program, sources=sources, events=tuple(events), memory=memory, specs=specs)
