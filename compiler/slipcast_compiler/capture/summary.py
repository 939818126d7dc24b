"""What a program does, for people and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from slipcast_compiler.capture.program import Call, Op, Program, Source, outputs_of
from slipcast_compiler.capture.roll import Loop, Phase, roll
from slipcast_compiler.capture.verify import Verdict
from slipcast_compiler.model.layers import Layers, layers_of


def summarise(program: Program, pipe: Any, verdict: Verdict | None = None) -> dict[str, Any]:
    """Plain JSON: sources, components with their calls, the loop's form, and what was read into Python."""
    loop, needed = roll(program), [program.events[place] for place in sorted(program.needed)]
    return {
        "pipeline": program.pipeline,
        "sources": [_source(program, source) for source in program.needed_sources],
        "lengths": {length.name: [length.minimum, length.maximum] for length in program.lengths},
        "components": _components(program, pipe, loop, needed),
        "glue": sum(isinstance(event, Op) for event in needed),
        "operators": dict(Counter(e.function._schema.name for e in needed if isinstance(e, Op)).most_common()),
        "loop": loop and _loop(program, loop),
        "guards": [
            {"operator": guard.operator, "where": guard.where, "of": list(guard.kinds), "times": times}
            for guard, times in Counter(program.guards).items()
        ],
        "verified": verdict and {"error": verdict.error, "difference": verdict.difference, "holds": verdict.holds},
    }


def render(summary: Mapping[str, Any]) -> str:
    """The same as text."""
    called, glue = len(summary["components"]), summary["glue"]
    lines = [f"{summary['pipeline']}: {called} modules are called, with {glue} operators between them"]
    lines += ["", "sources"]
    lines += [f"  {s['kind']:<7} {s['name']:<34} {s['dtype']} {s['shape']}" for s in summary["sources"]]
    lines += ["", "components"]
    for name, part in summary["components"].items():
        size = f"{part['parameters'] / 1e6:.1f} M" if part["parameters"] else ""
        lines.append(f"  {name:<34} {size:>10}  called {part['calls']} times, in the {part['part']}")
        lines += _layer_lines(part["layers"]) if part["layers"] else []
    lines += ["", *_loop_lines(summary["loop"])]
    if summary["guards"]:
        lines += ["", "read into Python, where the program cannot follow"]
        lines += [f"  {g['operator']:<24} {g['where']}" for g in summary["guards"]]
    if verdict := summary["verified"]:
        lines += ["", _verdict_line(verdict)]
    return "\n".join(lines)


def _source(program: Program, source: Source) -> dict[str, Any]:
    shape = program.specs[source.id][0]
    return {
        "kind": source.kind,
        "name": (" by " if source.kind == "noise" else ".").join(map(str, source.detail)),
        "dtype": str(source.value.dtype).removeprefix("torch."),
        "shape": [size if isinstance(size, int) else str(size) for size in shape],
    }


def _components(program: Program, pipe: Any, loop: Loop | None, needed: Iterable[Op | Call]) -> dict[str, Any]:
    """By module, in the order of the first call: parameters, calls, and the part of the bundle that it is for."""
    inside = {place for phase in loop.phases for step in phase.steps for place in step.events} if loop else set[int]()
    looped = {event.module for place in inside if isinstance(event := program.events[place], Call)}
    last = program.marks[-1].end if program.marks else len(program.events)
    place_of = {outputs_of(event): place for place, event in enumerate(program.events)}
    found: dict[str, Any] = {}
    for event in needed:
        if isinstance(event, Call):
            after = place_of[outputs_of(event)] >= last
            part = "denoiser" if event.module in looped else "decoder" if after else "conditioning"
            if event.module not in found:
                layers = describe_layers(layers_of(module_of(pipe, event.module))) if part == "denoiser" else None
                found[event.module] = {
                    "parameters": count_parameters(pipe, event.module), "calls": 0, "part": part, "layers": layers,
                }  # fmt: skip
            found[event.module]["calls"] += 1
    return found


def describe_layers(found: Layers) -> dict[str, Any]:
    """What passes could rewrite in a module, and by name why they leave other layers alone."""
    return {
        "heads": sum(layer.heads for layer in found.attention),
        "attention": len(found.attention),
        "neurons": sum(layer.neurons for layer in found.feed_forward),
        "feed_forward": len(found.feed_forward),
        "left_alone": {**found.unknown_attention, **found.unknown_feed_forward},
    }


def module_of(pipe: Any, name: str) -> nn.Module:
    """A module, by the name that calls have."""
    component, _, path = name.partition(".")
    module: nn.Module = pipe.components[component].get_submodule(path)
    return module


def count_parameters(pipe: Any, name: str) -> int:
    """Of a module, by the name that calls have."""
    return sum(parameter.numel() for parameter in module_of(pipe, name).parameters())


def count_linear(pipe: Any, name: str) -> int:
    """Of those, the weights of linear layers."""
    layers = {id(each): each for each in module_of(pipe, name).modules() if isinstance(each, nn.Linear)}
    return sum(each.weight.numel() for each in layers.values())


def _loop(program: Program, loop: Loop) -> dict[str, Any]:
    return {"carried": loop.carried, "steps": len(program.marks), "phases": [_phase(program, p) for p in loop.phases]}


def _phase(program: Program, phase: Phase) -> dict[str, Any]:
    events = [program.events[place] for place in phase.steps[0].events]
    return {
        "first": phase.first,
        "steps": len(phase.steps),
        "calls": [event.module for event in events if isinstance(event, Call)],
        "operators": sum(isinstance(event, Op) for event in events),
        "given": len(phase.steps[0].given),
        "table": list(phase.table),
        "guidance": phase.guidance,
        "ending": phase.ending,
    }


def _layer_lines(layers: dict[str, Any]) -> list[str]:
    lines = [
        f"    {layers['heads']} heads in {layers['attention']} attention layers, {layers['neurons']} neurons in "
        f"{layers['feed_forward']} feed-forward layers"
    ]
    named: dict[str, list[str]] = {}
    for name, why in layers["left_alone"].items():
        named.setdefault(why, []).append(name)
    for why, names in named.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"    passes leave {names[0]}{more} alone: {why}")
    return lines


def _loop_lines(loop: dict[str, Any] | None) -> list[str]:
    if not loop:
        return ["loop: none found: the scheduler takes no step that depends on a latent"]
    count = len(loop["phases"])
    lines = [f"loop: {loop['steps']} steps of {'one form' if count == 1 else f'{count} forms'}"]
    for phase in loop["phases"]:
        last = phase["first"] + phase["steps"]
        lines.append(
            f"  steps {phase['first'] + 1} to {last}: {' then '.join(phase['calls'])}, {phase['operators']} operators; "
            f"guidance {phase['guidance'] or 'none that is recognised: it ends with ' + phase['ending']}"
        )
        lines.append(
            f"    {sum(phase['table'])} numbers of the step table, {phase['given']} given from before the loop"
        )
    if not loop["carried"]:
        lines.append(
            "  between two steps the latent changes: more than the scheduler's step leads from one to the next"
        )
    return lines


def _verdict_line(verdict: dict[str, Any]) -> str:
    if verdict["holds"]:
        return (
            f"verified: another prompt and seed give the pipeline's own result, relative error {verdict['error']:.2g}"
        )
    why = "" if verdict["error"] is None else f"relative error {verdict['error']:.2g}; the first to differ is "
    return f"NOT the pipeline for another prompt, seed and picture: {why}{verdict['difference']}"
