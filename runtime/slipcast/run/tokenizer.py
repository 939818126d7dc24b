"""Prompts to token ids, with the `tokenizers` library alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from slipcast.engines.files import ModelFile
from slipcast.errors import ArtifactError, RequestError

logger = logging.getLogger("slipcast")

OnLongPrompt = Literal["warn", "error"]
SHOWN = 200  # characters of a text that messages repeat


class PromptTokenizer:
    """Token ids of fixed length, begin and end tokens included, as CLIP's text encoders expect them."""

    def __init__(self, file: ModelFile, max_length: int, pad_token_id: int) -> None:
        self._tokenizer = read_tokenizer(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_length, self.pad_token_id = max_length, pad_token_id

    def __call__(self, prompts: Sequence[str], on_long_prompt: OnLongPrompt = "warn") -> npt.NDArray[np.int64]:
        """int64 [len(prompts), max_length]. What does not fit is dropped from the end and said in a warning.

        Raises RequestError instead of warning with on_long_prompt="error".
        """
        rows = np.full((len(prompts), self.max_length), self.pad_token_id, np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            encoding = self._tokenizer.encode(prompt)
            ids = encoding.ids
            if len(ids) > self.max_length:
                dropped = prompt[encoding.offsets[self.max_length - 1][0] :]
                self._too_long(dropped, on_long_prompt)
                ids = [*ids[: self.max_length - 1], ids[-1]]
            row[: len(ids)] = ids
        return rows

    def _too_long(self, dropped: str, on_long_prompt: OnLongPrompt) -> None:
        message = f"prompt is longer than {self.max_length} tokens; dropped: {shorten(dropped)}"
        if on_long_prompt == "error":
            raise RequestError(message, hint="shorten the prompt, or pass on_long_prompt='warn'")
        logger.warning(message)


def read_tokenizer(file: ModelFile) -> Any:
    """The library's Tokenizer of a file; ArtifactError where it is none."""
    data = file.read_bytes()
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises a bare Exception for every defect
        raise ArtifactError(f"{file.name}: not a tokenizer", got=str(error), hint="compile the bundle again") from error


def shorten(text: str) -> str:
    """As it is quoted in a message, which does not grow with it."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def check_prompts(name: str, prompts: str | Sequence[str]) -> list[str]:
    """A prompt or a list of them as a list; RequestError for anything that is not text."""
    several = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(several, (list, tuple)) or not several:
        raise RequestError(
            f"{name} is not usable", expected="a string or a non-empty list of strings", got=repr(prompts)[:SHOWN]
        )
    for prompt in several:
        if not isinstance(prompt, str):
            raise RequestError(f"{name} is not usable", expected="a string", got=repr(prompt)[:SHOWN])
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError(
                f"{name} holds a lone surrogate", expected="valid Unicode", got=ascii(prompt)[:SHOWN]
            ) from None
    return list(several)
