"""Untrusted text to typed objects: strict JSON, bundle paths, and readable validation errors."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import typing
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from slipcast.errors import ArtifactError

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # what pydantic calls it in models and in dataclasses


class Strict(BaseModel):
    """A frozen record that refuses unknown keys, coercions, and NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def parse_json(data: bytes, name: str, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse JSON as RFC 8259 means it: UTF-8, no duplicate keys, no NaN, bounded in size (bytes) and depth.

    Raises ArtifactError naming `name` for anything else.
    """

    def refuse(problem: str, **facts: object) -> ArtifactError:
        return ArtifactError(f"{name}: {problem}", hint="get the file again from where it was built", **facts)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise refuse("duplicate key", expected="every key once", got=repr(key[:200]))
            found[key] = value
        return found

    def no_constant(literal: str) -> Any:
        raise refuse("number that JSON does not have", expected="a finite number or null", got=literal[:200])

    def finite(literal: str) -> float:
        value = float(literal)
        return value if math.isfinite(value) else no_constant(literal)

    if len(data) > limit:
        raise refuse("too large", expected=f"at most {limit} bytes", got=f"{len(data)} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("not UTF-8", expected="UTF-8 text", got=f"byte {error.start} cannot be decoded") from None
    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
        _check_depth(document)
        if b"\\ud" in data.lower():  # an escape may stand for half a character, which nothing can encode
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise refuse("nested too deeply", expected=f"at most {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise refuse("not valid JSON", got=str(error)) from None
    return document


def _check_depth(document: Any) -> None:
    """RecursionError below MAX_JSON_DEPTH levels; without this the limit would depend on the caller's stack."""
    level = [document] if isinstance(document, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise RecursionError


# Windows takes these for devices, with any extension; it also drops dots and spaces at the end of a name.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE)
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (zero-width, right-to-left), lone surrogates, line ends


def bundle_path(path: str) -> str:
    """A relative POSIX path that stays inside the bundle on every operating system; ValueError otherwise."""
    if not path or len(path) > 512:
        raise ValueError("a path has 1 to 512 characters")
    if any(unicodedata.category(c) in _HIDDEN for c in path):
        raise ValueError("control or invisible character in path")
    if "\\" in path:
        raise ValueError("backslash in path")
    if path.startswith("/") or path[1:2] == ":":
        raise ValueError("absolute path")
    if bad := set('<>:"|?*') & set(path):
        raise ValueError(f"{min(bad)!r} in path")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("empty, '.' or '..' part in path")
    if any(part[-1] in ". " or len(part.encode()) > 255 or _DEVICE.fullmatch(part) for part in parts):
        raise ValueError("a part of the path that some systems cannot hold")
    if unicodedata.normalize("NFC", path) != path:
        raise ValueError("path is not in Unicode form NFC")
    return path


BundlePath = Annotated[str, AfterValidator(bundle_path)]


def bundle_name(name: str) -> str:
    """A file's name that no system takes for anything else: files are called after a bundle. ValueError otherwise."""
    if "/" in bundle_path(name) or name[0] in ".-" or len(name) > 100:
        raise ValueError("a name has 1 to 100 characters, no slash, and begins with neither a dot nor a hyphen")
    return name


BundleName = Annotated[str, AfterValidator(bundle_name)]


def printable(text: str) -> str:
    """Text of one line; ValueError where a character of it would steer what shows it."""
    if any(unicodedata.category(c) in _HIDDEN for c in text):
        raise ValueError(f"control or invisible character in {text[:100]!a}")
    return text


Line = Annotated[str, StringConstraints(max_length=2000), AfterValidator(printable)]


def shown(text: str) -> str:
    """Text for a terminal, whoever wrote it: what would move the cursor, colour, hide or reverse is shown escaped."""

    def escaped(match: re.Match[str]) -> str:
        c = match[0]
        return c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _HIDDEN else c

    return re.sub(r"[^\x20-\x7e\n\t]", escaped, text)


def shown_json(text: str) -> str:
    """As `shown`, of a JSON document, which stays the same document."""

    def escaped(match: re.Match[str]) -> str:
        c = match[0]
        return json.dumps(c)[1:-1] if unicodedata.category(c) in _HIDDEN else c

    return re.sub(r"[^\x20-\x7e\n\t]", escaped, text)


def colliding(paths: Iterable[str]) -> tuple[str, str] | None:
    """The first two paths that a case-insensitive or Unicode-folding file system would take for one.

    Directories count too: "A/x" and "a/y" would share one, and "a" beside "A/x" could not exist.
    """
    seen: dict[str, tuple[str, bool]] = {}
    for path in paths:
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            part, is_file = "/".join(parts[:count]), count == len(parts)
            # Folding can undo the normal form, so that it takes a second normalisation (Unicode's NFKC_Casefold).
            folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold())
            known = seen.get(folded)
            if known is not None and (is_file or known != (part, False)):
                return known[0], path
            seen[folded] = (part, is_file)
    return None


def problems(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(location, sentence) for everything that is wrong, with a did-you-mean for unknown keys."""
    for item in error.errors(include_url=False):
        where = tuple(item["loc"])
        match item["type"]:
            case unknown if unknown in UNKNOWN_KEY:
                near = difflib.get_close_matches(str(where[-1])[:100], _keys(model, where[:-1]), n=1)
                yield where, f"unknown key {str(where[-1])[:100]!r}" + (f", did you mean {near[0]!r}?" if near else "")
            case "missing":
                yield where, "missing"
            case "value_error":
                yield where, str(item["ctx"]["error"])[:1000]
            case _:
                got = item["input"]
                shown = "" if isinstance(got, (dict, list, BaseModel)) else f", got {repr(got)[:200]}"
                yield where, item["msg"][0].lower() + item["msg"][1:] + shown


def dotted(location: Iterable[str | int]) -> str:
    """A location as the user wrote it: targets[0].engine. Keys that could upset a terminal are quoted and cut."""
    keys = (
        key if isinstance(key, int) or (key.isprintable() and len(key) <= 100) else repr(key[:100]) for key in location
    )
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.lstrip(".") or "(top level)"


def _keys(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Field names of the record at a location below `model`."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        else:  # a container: step into what it holds
            current = next((a for a in reversed(typing.get_args(current)) if a is not Ellipsis), None)
        # X | None: the record is the member that is a model or a container of one
        while (args := typing.get_args(current)) and type(None) in args:
            current = next(a for a in args if a is not type(None))
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return [field.name for field in dataclasses.fields(current)] if dataclasses.is_dataclass(current) else []
