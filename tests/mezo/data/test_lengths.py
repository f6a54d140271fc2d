"""Rows of a bounded number of tokens."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from mezo.data.encode import encode, encode_invocation
from mezo.data.example import batch_of
from tests.support.own_rows import only
from tests.support.tiny import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def test_a_long_row_loses_the_beginning_of_its_prompt(tokenizer):
    rows = [{"prompt": "<s> w5 w6 w7 w8", "completion": " w9"}]
    for limit, prompt in ((7, "<s> w5 w6 w7 w8"), (6, (1, 6, 7, 8)), (4, (1, 8))):
        assert only(rows, tokenizer, max_length=limit)[0].prompt == prompt
    with pytest.raises(ValueError, match="leave room for its prompt in max_length 3, got 2 tokens"):
        only(rows, tokenizer, max_length=3)


def test_a_long_text_loses_its_end(tokenizer):
    for limit, rest in ((5, (6, 7, 8, 2)), (4, (6, 7, 8)), (3, (6, 7)), (2, (6,))):
        (example,) = only([{"text": "w5 w6 w7 w8"}], tokenizer, max_length=limit)
        assert (example.prompt, example.completion) == ((5,), rest)


def test_the_longest_option_and_the_invocation_count(tokenizer):
    rows = [{"text": "w5 w6 w7", "label": x} for x in ("w8 w9", "w10")]
    made = only(rows, tokenizer, max_length=5, invocation="w4")
    assert (made[0].prompt, made[0].options) == ((6, 7), ((10,), (8, 9)))


def test_a_shortened_row_has_the_last_tokens_of_the_whole_one(tokenizer):
    """With what the tokenizer puts before it, and words that are many tokens."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    invocation = encode_invocation(" w4", tokenizer)
    rows = [{"prompt": " ".join(f"w{5 + i % 90}" for i in range(60)), "completion": " w8 \u00e9"}]
    (whole,) = encode(
        batch_of(only(rows, tokenizer, invocation=" w4")), tokenizer, invocation=invocation
    ).rows.tokens
    for limit in (64, 63, 30, 6):
        made = only(rows, tokenizer, invocation=" w4", max_length=limit)
        (row,) = encode(batch_of(made), tokenizer, invocation=invocation).rows.tokens
        assert row == (1, *whole[1 + len(whole) - limit :]) if limit < len(whole) else row == whole


def test_a_row_that_is_short_enough_stays_text(tokenizer):
    rows = [{"prompt": "w5 w6", "completion": " w7"}]
    for limit in (4, 100):
        assert only(rows, tokenizer, max_length=limit)[0].prompt == "w5 w6"
