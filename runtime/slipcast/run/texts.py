"""Texts to what a program's tokenizers give for them."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from slipcast.bundle.program import LengthRange, Variant
from slipcast.bundle.sources import PromptSource
from slipcast.errors import ArtifactError, RequestError
from slipcast.run.tokenizer import OnLongPrompt, shorten

logger = logging.getLogger("slipcast")

_QUOTED = re.compile(r"""'.*?'|".*?"|\u2018.*?\u2019|\u201c.*?\u201d""", re.DOTALL)
Tokens = npt.NDArray[np.int64] | npt.NDArray[np.int32]


class ProgramTexts:
    """The prompt sources of a variant, with their tokenizers, which pad and truncate as the pipeline does."""

    def __init__(self, tokenizers: Mapping[str, Any], variant: Variant) -> None:
        """`tokenizers`: by file. ArtifactError where one pads to more than a source takes."""
        self._sources = [source for source in variant.sources if isinstance(source, PromptSource)]
        self._lengths, self._tokenizers = variant.lengths, tokenizers
        self._ranges = {source.value: _range(source, variant) for source in self._sources}
        for source in self._sources:
            padding = self._tokenizers[source.tokenizer].padding or {}
            least = max(padding.get("length") or 0, padding.get("pad_to_multiple_of") or 0)
            if least > (most := self._ranges[source.value].maximum):
                raise ArtifactError(
                    f"{source.tokenizer}: pads to another length than {source.value} has",
                    expected=f"at most {most}",
                    got=least,
                    hint="compile the bundle again",
                )

    def __call__(
        self, texts: Sequence[Mapping[str, str]], on_long_prompt: OnLongPrompt
    ) -> dict[str, dict[str, Tokens]]:
        """By source and text, an array of the source's shape. `texts`: of each image, by argument; a source of constant
        text has that of "". RequestError where a text has another length, or is truncated and must not be."""
        encodings: dict[tuple[Any, ...], Any] = {}
        found: dict[str, dict[str, Tokens]] = {}
        for source in self._sources:
            given = dict.fromkeys(image[source.argument] for image in texts) if source.argument else {"": None}
            made = found.setdefault(source.value, {})
            for text in given:
                if source.argument and source.unquoted:
                    _check_unquoted(source.argument, text)
                whole = render(source, text)
                key = source.tokenizer, source.special_tokens, whole
                if key not in encodings:
                    encodings[key] = self._encode(source, whole, on_long_prompt)
                made[text] = self._field(source, encodings[key], text)
        return found

    def empty(self, source: PromptSource) -> npt.NDArray[np.int64]:
        """The different tokens of a source where its text is empty, whatever length that has."""
        tokenizer = self._tokenizers[source.tokenizer]
        ids = tokenizer.encode(render(source, ""), add_special_tokens=source.special_tokens).ids
        return np.unique(np.array(ids, np.int64))

    def _encode(self, source: PromptSource, whole: str, on_long_prompt: OnLongPrompt) -> Any:
        tokenizer = self._tokenizers[source.tokenizer]
        encoding = tokenizer.encode(whole, add_special_tokens=source.special_tokens)
        if encoding.overflowing:
            dropped, limit = _dropped(encoding, whole, tokenizer.truncation["direction"]), len(encoding.ids)
            _too_long(source, limit, dropped, on_long_prompt)
        return encoding

    def _field(self, source: PromptSource, encoding: Any, text: str) -> Tokens:
        """int [1, length] of what the source takes of an encoding."""
        row = fields_of(encoding)[source.field]
        _check_length(source, text, len(row), self._ranges[source.value])
        if source.length:
            _check_length(source, text, sum(encoding.attention_mask), self._lengths[source.length])
        return np.array([row], source.dtype)


def fields_of(encoding: Any) -> dict[str, list[int]]:
    """What an encoding holds, by the names of what a tokenizer gives."""
    mask = encoding.attention_mask
    positions = [max(0, count - 1) for count in accumulate(mask)]
    return {
        "input_ids": encoding.ids, "attention_mask": mask, "token_type_ids": encoding.type_ids,
        "position_ids": positions,
    }  # fmt: skip


def render(source: PromptSource, text: str) -> str:
    """What the tokenizer is given for a user's text; of a constant source, whatever the text."""
    if source.argument is None:
        return source.prefix + source.suffix
    text = mend_text(text) if source.mend else text
    text = clean_text(text) if source.clean else text.strip() if source.strip else text
    return source.prefix + (text.lower() if source.lower else text) + source.suffix


def clean_text(text: str) -> str:
    """As diffusers' pipelines do: entities of HTML as characters, twice over, and blanks as one space, none at the
    ends."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def mend_text(text: str) -> str:
    """As ftfy.fix_text does, which leaves plain text as it is. RequestError where ftfy is needed and not installed."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    try:
        from ftfy import fix_text
    except ImportError:
        raise RequestError(
            f"a text has characters that the pipeline mends with ftfy, which is not installed: {shorten(text)}",
            expected="letters, digits and punctuation of ASCII, or ftfy",
            got=shorten("".join(sorted({each for each in text if not each.isascii() or each == "&"}))),
            hint="pip install ftfy",
        ) from None
    return cast(str, fix_text(text))


def _check_unquoted(name: str, text: str) -> None:
    if quoted := _QUOTED.search(text):
        raise RequestError(
            f"{name} has quoted words, for which the pipeline does something else than this bundle: {shorten(text)}",
            expected="a text without words between quotation marks",
            got=shorten(quoted.group()),
            hint="leave the quotation marks out",
        )


def _check_length(source: PromptSource, text: str, length: int, legal: LengthRange) -> None:
    if legal.minimum <= length <= legal.maximum:
        return
    name, one = source.argument or f"the text of {source.value}", legal.minimum == legal.maximum
    raise RequestError(
        f"{name} has another length than this bundle is made for: {shorten(text)}",
        expected=f"{legal.minimum} tokens" if one else f"{legal.minimum} to {legal.maximum} tokens",
        got=str(length),
        hint="word it so that it has as many tokens, or compile a bundle for its length" if one else None,
    )


def _range(source: PromptSource, variant: Variant) -> LengthRange:
    size = source.shape[1]
    return variant.lengths[size] if isinstance(size, str) else LengthRange(minimum=size, maximum=size)


def _dropped(encoding: Any, whole: str, direction: str) -> str:
    """What of a text did not fit."""
    ends = [
        span for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special
    ] or [(0, 0)]
    return whole[: min(begin for begin, _ in ends)] if direction == "left" else whole[max(end for _, end in ends) :]


def _too_long(source: PromptSource, limit: int, dropped: str, on_long_prompt: OnLongPrompt) -> None:
    message = f"{source.argument} is longer than {limit} tokens; dropped: {shorten(dropped)}"
    if on_long_prompt == "error":
        raise RequestError(message, hint="shorten the prompt, or pass on_long_prompt='warn'")
    logger.warning(message)
