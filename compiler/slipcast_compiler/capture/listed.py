"""Numbers of which a call lists several: `num_inference_steps = [4, 8]`. Each combination is a call of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.blocks import parameters_of

SIZE = ("height", "width")  # which go in pairs, by place
_LISTS = re.compile(r"list|tuple|sequence", re.IGNORECASE)  # in the annotation of an argument that is one itself


def combinations(pipe: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The calls that a call with lists stands for, of which the first is the first of every list: all combinations of
    numbers, and of sizes the pairs (`height = [512, 768]`, `width = [768, 512]` are two). Arguments that are lists by
    themselves, such as sigmas, stay.

    RecipeError for a list that is empty, or of something else than different numbers, and for sizes without a pair.
    """
    lists = {name: tuple(value) for name, value in given.items() if _is_listed(pipe, name, value)}
    for name, values in lists.items():
        _check(name, values, paired=all(side in lists for side in SIZE) and name in SIZE)
    choices: list[list[dict[str, Any]]] = [
        [{name: value} for value in values] for name, values in lists.items() if name not in SIZE
    ]
    if sizes := _sizes({name: lists[name] for name in SIZE if name in lists}):
        choices.insert(0, sizes)
    found = []
    for parts in product(*choices):
        chosen = {name: value for part in parts for name, value in part.items()}
        found.append({name: chosen.get(name, value) for name, value in given.items()})
    return tuple(found)


def _is_listed(pipe: Any, name: str, value: Any) -> bool:
    parameter = parameters_of(pipe).get(name)
    if parameter is None or not isinstance(value, list | tuple):
        return False
    if parameter.annotation is parameter.empty:
        return isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)
    kind = parameter.annotation if isinstance(parameter.annotation, str) else str(parameter.annotation)
    plain = kind.removeprefix("<class '").removesuffix("'>")
    return bool(re.search(r"\b(int|float)\b", plain)) and not _LISTS.search(plain)


def _check(name: str, values: Sequence[Any], paired: bool) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not values or not numbers or (len(set(values)) < len(values) and not paired):
        raise RecipeError(
            f"call.{name}: a list means all of these, and each is captured",
            expected="different numbers, one or more" if not paired else "numbers, one or more",
            got=list(values),
        )


def _sizes(lists: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    if not lists:
        return []
    counts = {name: len(values) for name, values in lists.items()}
    if len(set(counts.values())) > 1:
        raise RecipeError(
            "call.height and call.width are pairs, by place",
            expected="as many of the one as of the other",
            got=" and ".join(f"{count} of {name}" for name, count in counts.items()),
        )
    pairs = [dict(zip(lists, pair, strict=True)) for pair in zip(*lists.values(), strict=True)]
    if twice := next((pair for at, pair in enumerate(pairs) if pair in pairs[:at]), None):
        raise RecipeError("call.height and call.width list a pair twice", expected="different sizes", got=twice)
    return pairs
