"""Tokens that the pipeline's own code pads to a multiple of some number: a tokenizer can do that by itself.

So the number of tokens that a program sees is the padded one, which its sizes follow; they do not follow the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from slipcast_compiler.capture.program import Op, Padding, Program, Ref, Source, refs


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
    fills = {int(token) for _, tokens, _ in pads for token in tokens.flatten()}
    left = pads[0][2]
    if len(fills) != 1 or any(pad[2] != left for pad in pads):
        return None
    sizes = [_padded_size(*pair) for pair in pairs]
    explaining = []
    for multiple in range(2, max(sizes) + 1):
        padding = Padding(multiple, min(fills), left)
        if [padding(source.value).shape[1] for source in sources] == sizes:
            explaining.append(padding)
    return explaining[0] if len(explaining) == 1 else None


def _is_alone(program: Program, source: Source) -> bool:
    """Whether it is text of which nothing else that the tokenizer gave is used, such as a mask that would be padded."""
    of_call = [each for each in program.needed_sources if each.tokenized is source.tokenized]
    return source.kind == "prompt" and source.tokenized is not None and source.value.ndim == 2 and len(of_call) == 1


def _find_pad(program: Program, source: Source) -> tuple[Op, torch.Tensor, bool] | None:
    """The event that puts constant tokens beside a source, these, and whether they come first; None where the source is
    used otherwise."""
    needed = [program.events[place] for place in program.needed]
    reading = [event for event in needed if Ref(source.id) in refs((event.args, event.kwargs))]
    event = reading[0] if len(reading) == 1 else None
    if not isinstance(event, Op) or event.function is not torch.ops.aten.cat.default or event.args[1:] != (1,):
        return None
    match event.args[0]:
        case [torch.Tensor() as tokens, Ref()]:
            return event, tokens, True
        case [Ref(), torch.Tensor() as tokens]:
            return event, tokens, False
    return None


def _padded_size(program: Program, source: Source) -> int:
    pad = _find_pad(program, source)
    return int(source.value.shape[1] + (pad[1].shape[1] if pad else 0))


def _padded(program: Program, source: Source, padding: Padding) -> Program:
    """The program without the event that pads, if it has it."""
    pad, value, events = _find_pad(program, source), source.id, list(program.events)
    memory, specs = dict(program.memory), dict(program.specs)
    if pad:  # what it gives is a source now; it stays in its place, for nobody
        (value,), unread = pad[0].outputs, max(memory) + 1
        memory[unread], specs[unread] = max(memory.values()) + 1, specs[value]
        events = [replace(pad[0], outputs=(unread,)) if event is pad[0] else event for event in events]
    made = replace(source, id=value, value=padding(source.value), padding=padding)
    sources = tuple(made if each.id == source.id else each for each in program.sources)
    if pad:
        sources += (source,)
    return replace(program, sources=sources, events=tuple(events), memory=memory, specs=specs)
