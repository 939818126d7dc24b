"""Write the parts of these pages that the code says by itself: tables of the recipe and the manifest, and commands.

    python docs/generate.py

A part stands between its two marks in a page; what is around them is written by hand. Keys come from the pydantic
models as they are: name, type, default and range. What a key means are the words that the code has for it: its
`description`, the phrase "`key`: ..." of the table's docstring, or the comment beside or above the field.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import annotated_types
import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS = Path(__file__).resolve().parent
Table = type[Any]  # a pydantic model or a dataclass
BOUNDS = {
    annotated_types.Ge: ("ge", "at least {}"), annotated_types.Gt: ("gt", "above {}"),
    annotated_types.Le: ("le", "at most {}"), annotated_types.Lt: ("lt", "below {}"),
}  # fmt: skip
SIMPLE = {str: "text", int: "an integer", float: "a number", bool: "true or false", Any: "values"}
SEVERAL = {"text": "texts", "an integer": "integers", "a number": "numbers", "true or false": "true and false"}


def marks(name: str) -> tuple[str, str]:
    """Between which lines of a page a part stands."""
    return f"<!-- {name}, written by docs/generate.py -->\n", f"<!-- end of the {name} -->\n"


def recipe() -> str:
    """Every table of a recipe, in the order of `Recipe`."""
    from slipcast_compiler.recipe.recipe import Recipe  # noqa: TID251 - a page about the compiler

    return "\n".join(tables(Recipe, ""))


def tables(table: Table, name: str, many: bool = False) -> Iterator[str]:
    """A table's heading, words and keys; then those of the tables in it."""
    path = f"{name}." if name else ""
    inner = [(f"{path}{key}", *found) for key, kind, *_ in keys_of(table) if (found := inner_table(kind))]
    head = ("`[[{}]]`" if many else "`[{}]`").format(name) if name else "At the top"
    links = {key: f"[{'tables' if several else 'a table'}](#{slug(key)})" for key, _, several in inner}
    yield section(head, table, {key.removeprefix(path): link for key, link in links.items()})
    for key, other, several in inner:
        yield from tables(other, key, several)


def manifest() -> str:
    """Every record of a manifest, once, in the order in which they are met."""
    from slipcast.bundle.manifest import Manifest
    from slipcast.bundle.program_manifest import ProgramManifest
    from slipcast.bundle.sources import ImageSource, NoiseSource

    records: list[Table] = [Manifest, ProgramManifest, NoiseSource, ImageSource]
    parts = []
    for record in records:  # which grows as records are met
        links = {}
        for key, kind, *_ in keys_of(record):
            if inner := inner_table(kind):
                other, several = inner
                links[key] = f"[{several * 'several '}{other.__name__}](#{slug(other.__name__)})"
                records += [other] * (other not in records)
        parts.append(section(record.__name__, record, links))
    return "\n".join(parts)


def section(head: str, table: Table, links: dict[str, str]) -> str:
    """Heading, words, and a line for each key; `links`: what is said in place of the type."""
    words, said = told(table)
    rows = [
        [f"`{key}`", links.get(key) or shown(kind, extra), default, words.get(key, "")]
        for key, kind, extra, default in keys_of(table)
    ]
    lines = [["key", "takes", "default", "what it is"], *rows]
    return "\n".join(part for part in (f"### {head}\n", said, markdown(lines)) if part)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def keys_of(table: Table) -> Iterator[tuple[str, Any, list[Any], str]]:
    """(name, type, constraints, default as written) of each field."""
    if dataclasses.is_dataclass(table):
        kinds = typing.get_type_hints(table, include_extras=True)
        for each in dataclasses.fields(table):
            given = each.default is not dataclasses.MISSING
            yield each.name, kinds[each.name], [], toml(each.default) if given else "required"
        return
    for name, field in table.model_fields.items():
        yield name, field.annotation, list(field.metadata), default_of(field)


def default_of(field: FieldInfo) -> str:
    """What stands in the place of a key that is not given."""
    if field.is_required():
        return "required"
    return toml(field.get_default(call_default_factory=True))


def toml(value: Any) -> str:
    """A value as a recipe would have it; nothing for what stands for none."""
    if value is None or value in ((), {}) or isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def inner_table(kind: Any) -> tuple[Table, bool] | None:
    """The table that a type holds, and whether it holds several."""
    if isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)):
        return kind, False
    several = typing.get_origin(kind) in (tuple, dict)
    found = [table for part in typing.get_args(kind) if (table := inner_table(part))]
    return (found[0][0], several or found[0][1]) if found else None


def shown(kind: Any, constraints: list[Any]) -> str:
    """A type and its range, in words."""
    said = plain(kind)
    limits = dict.fromkeys([*bounds(constraints), *bounds_within(kind)])
    return ", ".join([said, *limits])


def plain(kind: Any) -> str:
    """A type in words."""
    if kind in SIMPLE:
        return SIMPLE[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return plain(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(plain(part) for part in parts if part is not types.NoneType))
    if origin is dict:
        return f"{plain(parts[1])} by name"
    if origin in (tuple, list):
        items = dict.fromkeys(plain(part) for part in parts if part is not Ellipsis)
        return "a list of " + " and ".join(SEVERAL.get(item, item) for item in items)
    return getattr(kind, "__name__", str(kind))


def bounds_within(kind: Any) -> Iterator[str]:
    """Ranges that stand inside a type: Annotated[int, Field(ge=1)] | None. Those of what a list holds are left out."""
    if typing.get_origin(kind) in (dict, tuple, typing.Literal) or inner_table(kind):
        return
    if typing.get_origin(kind) is typing.Annotated:
        yield from bounds(list(kind.__metadata__))
    for part in typing.get_args(kind):
        yield from bounds_within(part)


def bounds(constraints: list[Any]) -> Iterator[str]:
    """What constraints say."""
    least = [each.min_length for each in constraints if isinstance(each, annotated_types.MinLen)]
    most = [each.max_length for each in constraints if isinstance(each, annotated_types.MaxLen)]
    if most and least == most:
        yield f"{most[0]} long"
        return
    for each in constraints:
        if isinstance(each, FieldInfo):
            yield from bounds(each.metadata)
        elif type(each) in BOUNDS:
            attribute, words = BOUNDS[type(each)]
            yield words.format(power(getattr(each, attribute)))
        elif isinstance(each, annotated_types.MinLen) and each.min_length:
            yield f"at least {each.min_length} long"
        elif isinstance(each, annotated_types.MaxLen):
            yield f"at most {each.max_length} long"
        elif pattern := getattr(each, "pattern", None):
            yield f"matching `{pattern}`"


def power(value: Any) -> str:
    """A number, large ones as powers of two."""
    if isinstance(value, int) and value > 2**20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def told(table: Table) -> tuple[dict[str, str], str]:
    """Words by key, those of a base's keys too, and what else the docstring says, as a paragraph."""
    names = [name for name, *_ in keys_of(table)]
    words, text = comments(table), ""
    for base in reversed(table.__mro__):
        if base is table or (issubclass(base, BaseModel) and base.__module__.startswith("slipcast")):
            text = take_phrases(inspect.cleandoc(base.__doc__ or ""), names, words)
    for name in names:
        if description := getattr(getattr(table, "model_fields", {}).get(name), "description", None):
            words[name] = description
    text = re.sub(r"^\[[a-z0-9_.]+\]: ", "", text.strip())
    text = re.sub(r"^See the module's docstring\.?\s*", "", text)
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    said = "\n".join(paragraph(sentence(part)) for part in paragraphs if part)
    return {name: escaped(word) for name, word in words.items()}, said


def take_phrases(text: str, names: list[str], words: dict[str, str]) -> str:
    """Put what a docstring says of keys beside the other words; what is left of it."""
    for name in names:
        # A phrase "`key`: ..." ends with its sentence, or where that of another key begins.
        phrase = re.search(rf"`{name}`:\s+(.*?)(?:\.(?=\s|$)|;(?=\s+`)|$)\s*", text, re.DOTALL)
        if phrase:
            words[name] = " ".join(phrase[1].split())
            before, after = text[: phrase.start()], text[phrase.end() :]
            text = (re.sub(r";\s*$", ". ", before) if after[:1].isupper() else before) + after
    return text


def sentence(text: str) -> str:
    """With a capital, where it does not begin with a key, and an end, where a phrase was taken from it."""
    first = text.split()[0]
    return (text if "_" in first else text[0].upper() + text[1:]).removesuffix(";") + "." * text.endswith(";")


def comments(table: Table) -> dict[str, str]:
    """The comment beside each field, or the one that stands alone above it; a base's too."""
    found: dict[str, str] = {}
    for base in reversed(table.__mro__):
        if base.__module__.split(".")[0] not in ("slipcast", "slipcast_compiler"):
            continue
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        (tree,) = ast.parse("\n".join(lines)).body
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                assert node.end_lineno
                beside = lines[node.end_lineno - 1][node.end_col_offset :].strip()
                above = lines[node.lineno - 2].strip()
                said = [text for text in (beside, above) if text.startswith("#") and "type: ignore" not in text]
                for text in said[:1]:
                    found[node.target.id] = text.lstrip("# ")
    return found


def commands() -> str:
    """Every command with its arguments and options."""
    from slipcast.cli.main import cli

    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))["project"]
    known: dict[str, click.Command] = dict(cli.commands)
    for name, place in project["entry-points"]["slipcast.commands"].items():
        module, _, attribute = place.partition(":")
        known[name] = getattr(importlib.import_module(module), attribute)
    return "\n".join(part for name in sorted(known) for part in command(known[name], f"slipcast {name}"))


def command(made: click.Command, name: str) -> Iterator[str]:
    """A command's section; those of its own commands follow."""
    context = click.Context(made, info_name=name)
    arguments = " ".join(made.collect_usage_pieces(context))
    words = re.sub(r"\n(?!\n)", " ", inspect.cleandoc(made.help or "")).replace("\n ", "\n\n")
    text = [f"### `{name}`\n", f"```text\n{name} {arguments}\n```\n"]
    text += [paragraph(part) for part in words.split("\n\n") if part.strip()]
    rows = [record for param in made.params if (record := param.get_help_record(context))]
    options = [[f"`{escaped(option)}`", escaped(help)] for option, help in rows if option.startswith("-")]
    if options:
        text.append(markdown([["option", "what it does"], *options]))
    if made.epilog:
        text.append(paragraph(made.epilog))
    yield "\n".join(text)
    if isinstance(made, click.Group):
        for inner in made.list_commands(context):
            found = made.get_command(context, inner)
            assert found
            yield from command(found, f"{name} {inner}")


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    first, *rest = ["| " + " | ".join(line) + " |\n" for line in lines]
    return "".join([first, "|---" * len(lines[0]) + "|\n", *rest])


def escaped(text: str) -> str:
    """What may stand in a cell."""
    return text.replace("|", "\\|")


def paragraph(text: str) -> str:
    """Wrapped as the pages are."""
    return textwrap.fill(text, 150, break_long_words=False, break_on_hyphens=False) + "\n"


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "tables": ("recipe.md", recipe), "manifest": ("bundle.md", manifest), "commands": ("commands.md", commands),
}  # fmt: skip


def replaced(page: str, name: str) -> str:
    """The text of a page with its part written anew."""
    begin, end = marks(name)
    before, rest = page.split(begin)
    return before + begin + "\n" + PARTS[name][1]() + "\n" + rest[rest.index(end) :]


if __name__ == "__main__":
    for part, (file, _) in PARTS.items():
        (DOCS / file).write_text(replaced((DOCS / file).read_text("utf-8"), part), "utf-8")
