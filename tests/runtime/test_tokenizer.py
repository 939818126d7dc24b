"""The same ids as transformers' CLIPTokenizer, whatever the text; and what is not text is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TOKENIZER
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from slipcast.errors import ArtifactError, RequestError
from slipcast.run.tokenizer import PromptTokenizer, check_prompts

LENGTH, PAD = 32, 655
OURS = PromptTokenizer(TOKENIZER, LENGTH, PAD)
THEIRS = CLIPTokenizer.from_pretrained(TOKENIZER.parent)

WORDS = st.sampled_from(
    ["a", "large", "red", "Circle", "on", "background", "it's", "don't", "3.14", "1024x768", "<|endoftext|>",
     "<|startoftext|>", "</w>", "ﬁn", "naïve", "e\u0301", "é", "İ", "ß", "ǅ", "汉字", "日本",
     "😀", "👩‍👩‍👧", "🏴‍☠️", "🇩🇪", "\u200b", "\u00a0",
     "\t", "\n", "  ", "\u3000", "\ufeff", "\x00", "\x7f", "!!!", "(a:1.2)", "--", "…", "𝕬", "\u0300\u0301\u0302"]
)  # fmt: skip
SENTENCES = st.builds(
    lambda words, gap: gap.join(words), st.lists(WORDS, max_size=30), st.sampled_from([" ", "", "  "])
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=400)
@given(st.lists(st.one_of(SENTENCES, ANY_TEXT), min_size=1, max_size=4))
@example([""])
@example([" "])
@example(["circle " * 500])
@example(["😀" * 200])
@example(["x" * 5000])
@example([("a " * 29) + "large", ("a " * 30) + "large", ("a " * 31) + "large"])  # at, and one beyond, the length
def test_ids_are_those_of_transformers(prompts: list[str]) -> None:
    expected = THEIRS(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np")
    found = OURS(prompts)
    assert found.dtype == np.int64
    assert found.shape == (len(prompts), LENGTH)
    np.testing.assert_array_equal(found, expected.input_ids)


def test_the_reference_is_the_whole_of_it() -> None:
    """So that the comparison above compares what it says."""
    assert THEIRS.pad_token_id == PAD
    assert THEIRS.model_max_length == LENGTH
    ids = OURS(["a red circle"])[0].tolist()
    assert ids[0] == THEIRS.bos_token_id
    assert ids[4:] == [THEIRS.eos_token_id] + [PAD] * (LENGTH - 5)


@given(st.one_of(SENTENCES, ANY_TEXT))
def test_the_dropped_text_is_named_exactly_where_there_is_some(prompt: str) -> None:
    whole = len(PromptTokenizer(TOKENIZER, 100_000, PAD)._tokenizer.encode(prompt).ids)
    try:
        OURS([prompt], "error")
    except RequestError as error:
        assert whole > LENGTH
        dropped = next(prompt[i:] for i in range(len(prompt) + 1) if error.message.endswith(f"dropped: {prompt[i:]!r}"))
        assert dropped
    else:
        assert whole <= LENGTH


def test_a_long_prompt_warns_with_what_was_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "slipcast")
    OURS(["a " * 28 + "red circle", "a " * 30 + "red CIRCLE, please"])
    (record,) = caplog.records
    assert record.getMessage() == "prompt is longer than 32 tokens; dropped: 'red CIRCLE, please'"


def test_a_long_prompt_as_an_error() -> None:
    with pytest.raises(RequestError, match=r"dropped: 'circle'\n.*shorten the prompt"):
        OURS(["a " * 30 + "circle"], "error")
    assert OURS(["a " * 30], "error").shape == (1, LENGTH)


def test_truncation_and_padding_of_the_file_do_not_matter(tmp_path: Path) -> None:
    """Published tokenizer files carry those of their last use."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9, pad_id=1)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompts = ["a", "a large red circle on a white background"]
    np.testing.assert_array_equal(PromptTokenizer(tmp_path / "tokenizer.json", LENGTH, PAD)(prompts), OURS(prompts))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "9"}', b"\xff\xfe", b"[1"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer"):
        PromptTokenizer(tmp_path / "tokenizer.json", LENGTH, PAD)


@pytest.mark.parametrize("prompts", ["", "x", "🟥", ["x"], ["x", ""], ("x", "y")])
def test_prompts_become_a_list(prompts: Any) -> None:
    assert check_prompts("prompt", prompts) == ([prompts] if isinstance(prompts, str) else list(prompts))


@pytest.mark.parametrize("prompts", [None, 3, b"x", [], (), {"a": 1}, ["x", None], [3], [["x"]], "\ud83d", ["\udc00"]])
def test_what_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(RequestError, match="negative_prompt"):
        check_prompts("negative_prompt", prompts)
