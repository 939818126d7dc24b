"""On which line of a TOML text each key stands: one walk over the text, which tomllib has taken for valid already."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator

Location = tuple[str | int, ...]

_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\''  # strings, long ones first
    r"|\#[^\n]*|\n|[\[\]{},=.]|[^\s\[\]{},=.\"'\#]+",
    re.DOTALL,
)


def key_lines(text: str) -> dict[Location, int]:
    """Keys, tables and elements of arrays by location, with their line, counted from 1: the first that speaks of it."""
    walk = _Walk(text)
    with contextlib.suppress(RecursionError):  # what is nested so deeply is refused anyway
        walk.document()
    return walk.found


class _Walk:
    """Reads tokens; `found` fills as keys go by."""

    def __init__(self, text: str) -> None:
        self.found: dict[Location, int] = {}
        self._tables: dict[Location, int] = {}  # arrays of tables, with the number of the last one
        self._tokens = _tokens(text)
        self._token, self._line = next(self._tokens)

    def document(self) -> None:
        """Headers and pairs, to the end."""
        table: Location = ()
        while self._token:
            if self._token == "\n":
                self._next()
            elif self._token == "[":
                table = self._header()
            else:
                self._pair(table)

    def _next(self) -> str:
        taken = self._token
        self._token, self._line = next(self._tokens)
        return taken

    def _header(self) -> Location:
        line = self._line
        self._next()
        several = self._token == "["
        if several:
            self._next()
        names = self._key("]")
        self._next()
        if several:
            self._next()
        at: Location = ()
        for number, name in enumerate(names, 1):
            at = (*at, name)
            self._note(at, line)
            if several and number == len(names):
                self._tables[at] = self._tables.get(at, -1) + 1
            if at in self._tables:  # the last of an array of tables
                at = (*at, self._tables[at])
                self._note(at, line)
        return at

    def _key(self, end: str) -> Location:
        parts: list[str] = []
        while self._token != end:
            token = self._next()
            if token != ".":
                parts.append(tomllib.loads(f"k = {token}")["k"] if token[0] in "\"'" else token)
        return tuple(parts)

    def _pair(self, table: Location) -> None:
        line = self._line
        at = table
        for part in self._key("="):
            at = (*at, part)
            self._note(at, line)
        self._next()
        self._value(at)

    def _value(self, at: Location) -> None:
        if self._token == "[":
            self._array(at)
        elif self._token == "{":
            self._next()
            while self._skip() != "}":
                self._pair(at)
            self._next()
        else:
            while self._token not in ("\n", ",", "]", "}", ""):  # a number with a point, a date with a space
                self._next()

    def _array(self, at: Location) -> None:
        self._next()
        number = 0
        while self._skip() != "]":
            self._note((*at, number), self._line)
            self._value((*at, number))
            number += 1
        self._next()

    def _skip(self) -> str:
        """Past line ends and commas."""
        while self._token in ("\n", ","):
            self._next()
        return self._token

    def _note(self, at: Location, line: int) -> None:
        self.found.setdefault(at, line)


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """(token, line), without comments; at the end "", for ever."""
    line, at = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", at, match.start())
        at = match.start()
        if match[0][0] != "#":
            yield match[0], line
    while True:
        yield "", line
