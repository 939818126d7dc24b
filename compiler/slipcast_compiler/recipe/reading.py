"""Read a recipe: from TOML and `--set`, with every problem told at once, each with the line it stands on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slipcast.bundle.validation import dotted, problems
from slipcast.errors import RecipeError
from slipcast_compiler.recipe.lines import Location, key_lines
from slipcast_compiler.recipe.recipe import NEEDS, Recipe, precision_contradictions
from slipcast_compiler.recipe.targets import TargetTable
from slipcast_compiler.recipe.values import read_plain

__all__ = [
    "Location",
    "key_lines",
    "parse_override",
    "parse_recipe",
    "parse_target",
    "parse_toml",
    "put",
    "read_recipe",
]

MAX_BYTES = 16 << 20
MAX_DEPTH = 32  # of tables and arrays in each other
MOST_TOLD = 50  # problems


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; `overrides` are "key.in.recipe=value" with TOML values.

    Raises RecipeError with all problems at once, each as file:line: key: problem.
    """
    text = read_text(path, "write one with `slipcast init MODEL_DIR PROMPTS.txt`")
    return parse_recipe(text, str(path), overrides)


def read_text(path: Path, hint: str) -> str:
    """A recipe's text; RecipeError, with the hint, where there is none."""
    try:
        return read_plain(path, MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe", hint=hint) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read", expected="a UTF-8 TOML file", got=str(error)) from None


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """As read_recipe, from text; `name` stands for the file in messages."""
    document = parse_toml(text, name)
    forced = {parse_override(document, override): override for override in overrides}
    if found := list(_unusable(document)):
        raise refusal(found, text, name, forced)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        found = [*problems(error, Recipe), *_hidden_contradictions(error, document)]
        raise refusal(found, text, name, forced) from None


def parse_target(wanted: str, overrides: Sequence[str] = ()) -> TargetTable:
    """A target by itself, as "engine" or "engine:precision"; `overrides` are "key=value" as for recipes."""
    engine, _, precision = wanted.partition(":")
    document: dict[str, Any] = {"engine": engine, **({"precision": precision} if precision else {})}
    for override in overrides:
        parse_override(document, override)
    try:
        return TargetTable.model_validate(document)
    except ValidationError as error:
        lines = [f"{dotted(where)}: {what}" for where, what in problems(error, TargetTable)]
        raise RecipeError(f"--target {wanted} is not usable:\n  " + "\n  ".join(lines)) from None


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The TOML text's tables; RecipeError, naming `name`, where it is none."""
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and what Python says of numbers with thousands of digits
        raise RecipeError(f"{name}: not valid TOML", got=str(error)) from None
    except RecursionError:
        expected = f"at most {MAX_DEPTH} tables and arrays in each other"
        raise RecipeError(f"{name}: nested too deeply", expected=expected) from None


def _unusable(document: dict[str, Any]) -> Iterator[tuple[Location, str]]:
    """What TOML allows and nothing here could be called: texts with NUL, and what is nested too deeply."""
    level: list[tuple[Location, Any]] = [((), document)]
    for _ in range(MAX_DEPTH):
        inner = [((*at, key), value) for at, holder in level for key, value in _items(holder)]
        yield from ((at, "NUL in a text") for at, value in inner if "\0" in (value if isinstance(value, str) else ""))
        level = [(at, value) for at, value in inner if isinstance(value, (dict, list))]
    yield from ((at[:1], f"more than {MAX_DEPTH} tables and arrays in each other") for at, _ in level[:1])


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    yield from value.items() if isinstance(value, dict) else enumerate(value)


def refusal(
    found: Sequence[tuple[Location, str]], text: str, name: str, forced: Mapping[Location, str] | None = None
) -> RecipeError:
    """All problems at once, each with the line it stands on, or the override in `forced` that it came from."""
    lines, forced = key_lines(text), forced or {}
    messages = []
    for where, what in found[:MOST_TOLD]:
        place = next((f"--set {forced[k]}" for k in forced if where[: len(k)] == k[: len(where)]), None)
        place = place or f"{name}:{_line(lines, where)}"
        messages.append((_line(lines, where), f"{place}: {dotted(where)}: {what}"))
    listing = "\n  ".join(message for _, message in sorted(messages))
    more = f"\n  and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    return RecipeError(f"{len(found)} problem{'s' * (len(found) > 1)} in the recipe:\n  {listing}{more}")


def _line(lines: dict[Location, int], where: Location) -> int:
    """The line of the key, or of the nearest table around it (a missing key has none)."""
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 1)


def parse_override(document: dict[str, Any], override: str) -> Location:
    """Put "a.b=value" into the document; returns the key's location."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: not usable", expected="--set key.in.recipe=value", got=override)
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value  # a bare word is text
    return put(document, key, parsed, f"--set {override}")


def put(document: dict[str, Any], key: str, value: Any, named: str) -> Location:
    """Put a value at the dotted key; `named` is what messages call it. Returns the key's location."""
    location: Location = tuple(int(p) if p.isascii() and p.isdigit() else p for p in key.strip().split("."))
    current: Any = document
    try:
        for part in location[:-1]:
            current = current[part] if isinstance(part, int) else current.setdefault(part, {})
        current[location[-1]] = value
    except (TypeError, IndexError, KeyError, AttributeError):
        raise RecipeError(f"{named}: the recipe has no such place", got=key) from None
    return location


def _hidden_contradictions(error: ValidationError, document: dict[str, Any]) -> Iterator[tuple[Location, str]]:
    """Contradictions within tables that are sound by themselves: pydantic stops at the first level that fails."""
    if any(not item["loc"] for item in error.errors()):
        return
    bad = {item["loc"][0] for item in error.errors()}
    gate, evaluate = document.get("gate", {}), document.get("evaluate", {})
    for limit, needed in NEEDS.items():
        if not {"gate", "evaluate"} & bad and limit in gate and needed not in evaluate:
            yield ("gate", limit), f"gate.{limit} needs evaluate.{needed}"
    if not {"targets", "passes"} & bad:
        precisions = {str(target.get("precision")) for target in document.get("targets", [])}
        yield from precision_contradictions(precisions, document.get("passes", {}).keys())
