"""What becomes of a call's texts before a tokenizer has them: found by giving two and comparing.

A text that a tokenizer is given is prefix + text of the call + suffix, or constant. The text may be stripped, in lower
case, and cleaned. Whatever else a pipeline does with it is refused: a runtime that did something else would draw
something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from slipcast.errors import RecipeError
from slipcast.run.texts import clean_text, mend_text
from slipcast_compiler.capture.program import Program, Source

# Awkward on purpose: blanks at both ends and within, capitals, marks of HTML, an address, punctuation, another script.
AWKWARD = "  A Big <b>RED</b> circle, \t50% off &amp;lt; http://example.org/a_b.png (1:1) #2 \u201cBleu\u201d \u732b  "

UNQUOTED = AWKWARD.replace("\u201c", "").replace("\u201d", "")
OTHER_PROMPT = "two large things and some words more"  # of another length than the others have
# Whether a text is stripped, cleaned, and mended.
CHANGES = ((False, False, False), (True, False, False), (False, True, False), (False, True, True), (False, False, True))
SHORT = "a"  # a token in most vocabularies, as it is after a blank


@dataclass(frozen=True)
class Template:
    """The text is prefix + the text of `argument` + suffix, where that is mended, cleaned, stripped or in lower case
    first; without `argument` it is the prefix. `unquoted`: this is so of texts without quoted words alone."""

    argument: str | None
    prefix: str = ""
    suffix: str = ""
    lower: bool = False
    strip: bool = False
    clean: bool = False
    mend: bool = False
    unquoted: bool = False

    def __call__(self, texts: Mapping[str, str]) -> str:
        """The text for these texts of the call."""
        given = texts[self.argument] if self.argument else ""
        given = mend_text(given) if self.mend else given
        given = clean_text(given) if self.clean else given.strip() if self.strip else given
        return self.prefix + (given.lower() if self.lower else given) + self.suffix


def texts_of(call: Mapping[str, Any]) -> dict[str, str]:
    """By argument, the texts of a call that are prompts: all that have the word in their names."""
    found = {}
    for name, value in call.items():
        if "prompt" in name and isinstance(value, str):
            found[name] = value
    return found


def with_others(call: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The call, with each of its prompts changed but for `prompt` itself, and for those that say nothing: pipelines do
    something else for them."""
    others = {name: text for name, text in texts_of(call).items() if name != "prompt" and text.strip()}
    return {**call, **{name: change(text) for name, text in others.items()}}


def find_templates(
    programs: tuple[Program, Program], calls: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> dict[int, Template]:
    """By source of the first program, how its text is made; of two captures that differ in their texts.

    RecipeError where it is made otherwise.
    """
    found = {}
    for one, other in zip(*(program.needed_sources for program in programs), strict=True):
        if one.kind == "prompt":
            texts = _single(one, programs[0]), _single(other, programs[1])
            found[one.id] = _template(texts, (texts_of(calls[0]), texts_of(calls[1])), one, programs[0])
    return found


def _single(source: Source, program: Program) -> str:
    given = source.tokenized.texts if source.tokenized else None
    if given is None or len(given) != 1:
        raise _refuse(source, program, "one text", "several at once" if given else "something else than texts")
    return given[0]


def _template(
    texts: tuple[str, str], arguments: tuple[Mapping[str, str], Mapping[str, str]], source: Source, program: Program
) -> Template:
    for name, (strip, clean, mend), lower in product(arguments[0], CHANGES, (False, True)):
        plain = Template(name, lower=lower, strip=strip, clean=clean, mend=mend)
        prefix, text, suffix = texts[0].partition(plain(arguments[0]) or "\0")  # an empty one is constant
        found = replace(plain, prefix=prefix, suffix=suffix)
        if text and text not in suffix and tuple(map(found, arguments)) == texts:
            return found
    if texts[0] == texts[1]:
        return Template(None, texts[0])
    raise _refuse(
        source,
        program,
        "prefix + prompt + suffix, perhaps mended, cleaned, stripped and in lower case",
        repr(texts[1])[:300],
    )


def _refuse(source: Source, program: Program, expected: str, got: str) -> RecipeError:
    return RecipeError(
        f"{program.pipeline}: what its {source.detail[0]} is given cannot be made in a runtime",
        expected=expected,
        got=got,
        hint="an argument of the pipeline may turn it off, such as clean_caption: --set call.clean_caption=false",
    )
