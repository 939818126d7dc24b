"""Run a program again, with other sources and with real modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slipcast_compiler.capture.program import (
    Affine,
    Call,
    Op,
    Path,
    Program,
    Ref,
    leaves,
    measure,
    opened,
    outputs_of,
    rebuild,
)

Values = dict[int, torch.Tensor]


def replay(program: Program, sources: Mapping[int, torch.Tensor], components: Mapping[str, nn.Module]) -> Any:
    """By path, the results: with these values of the sources (weights come from the components)."""
    values = dict(sources)
    for source in program.needed_sources:
        if source.kind == "weight":
            values[source.id] = _weight(components, str(source.detail[0]))
    with torch.no_grad():
        lengths = measure(program.lengths, values)
        for place in sorted(program.needed):
            run(program.events[place], values, components, lengths)
    return _results(program, values)


def _results(program: Program, values: Values) -> dict[Path, Any]:
    return {path: values[found.id] if isinstance(found, Ref) else found for path, found in program.results}


def _run_inside(
    inside: Program, given: Any, components: Mapping[str, nn.Module], lengths: Mapping[str, Any]
) -> dict[Path, Any]:
    """By path, what a call returns that is given these arguments."""
    arguments = dict(leaves(given))
    values = {
        source.id: _weight(components, source.detail[0]) if source.kind == "weight" else arguments[source.detail]
        for source in inside.sources
    }
    for event in inside.events:
        run(event, values, components, lengths)
    return _results(inside, values)


def run(event: Op | Call, values: Values, components: Mapping[str, nn.Module], lengths: Mapping[str, Any]) -> None:
    """One event, whose values are put beside those that it reads."""

    def given(each: Any) -> Any:
        if isinstance(each, Affine):
            return each.at(lengths)
        return values[each.id] if isinstance(each, Ref) else each

    args, kwargs = rebuild((event.args, event.kwargs), given)
    if isinstance(event, Op):
        found = [tensor for _, tensor in leaves(event.function(*args, **kwargs))]
    elif event.inside:
        out = _run_inside(event.inside, (args, kwargs), components, lengths)
        found = [out["returned", *path] for path, _ in event.outputs]
        found += [out["written", *path] for path, _ in event.written]
    else:
        out = dict(leaves(opened(find_module(components, event.module)(*args, **kwargs))))
        put = dict(leaves((args, kwargs))) if event.written else {}
        found = [*(out[path] for path, _ in event.outputs), *(put[path] for path, _ in event.written)]
    values.update(zip(outputs_of(event), found, strict=True))


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's components that are modules, by name."""
    return {name: each for name, each in pipe.components.items() if isinstance(each, nn.Module)}


def find_module(components: Mapping[str, nn.Module], name: str) -> nn.Module:
    """A module by the name that calls have: of the component, and within it."""
    component, _, path = name.partition(".")
    return components[component].get_submodule(path)


def _weight(components: Mapping[str, nn.Module], name: str) -> torch.Tensor:
    module, _, own = name.rpartition(".")
    found: torch.Tensor = getattr(find_module(components, module), own)
    return found.detach()


__all__ = ["Path", "find_module", "modules_of", "replay", "run"]
