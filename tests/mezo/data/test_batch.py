"""Batches and their encoding: the prompt's tokens, the split, the checks."""

from __future__ import annotations

import pytest

import mezo
from mezo.data.encode import encode, encode_invocation
from tests.support.tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_completions_make_one_row_each():
    encoded = encode(mezo.Batch(prompts=[[5, 6], [7]], completions=[[8], [9, 10]]), None)
    assert encoded.rows.tokens == ((5, 6, 8), (7, 9, 10))
    assert encoded.rows.prompt_lens == (2, 1)
    assert encoded.targets.counts == (1, 2)
    assert encoded.targets.num_options is None
    assert encoded.targets.objective == "completion"


def test_shared_and_own_options():
    shared = mezo.Batch(prompts=[[5], [6]], options=[[1], [2, 3]], labels=[1, 0])
    encoded = encode(shared, None)
    assert encoded.rows.tokens == ((5, 1), (5, 2, 3), (6, 1), (6, 2, 3))
    assert encoded.targets.num_options == (2, 2)
    own = mezo.Batch(prompts=["a", "b"], options=[["x", "y"], ["z", "x", "y"]], labels=[0, 2])
    assert own.pairs() == [("a", "x"), ("a", "y"), ("b", "z"), ("b", "x"), ("b", "y")]
    assert own.num_options() == (2, 3)
    own_ids = mezo.Batch(prompts=[[5], [6]], options=[[[1], [2]], [[3], [4]]], labels=[0, 1])
    assert own_ids.pairs() == [([5], [1]), ([5], [2]), ([6], [3]), ([6], [4])]


def test_text_is_split_behind_the_prompts_own_tokens(tokenizer):
    encoded = encode(mezo.Batch(prompts=["w5 w6"], completions=[" w7"]), tokenizer)
    assert encoded.rows.tokens == ((5, 6, 7),)
    assert encoded.rows.prompt_lens == (2,)


def test_the_invocation_stands_between_prompt_and_completion(tokenizer):
    text = mezo.Batch(prompts=["w5 w6", ""], completions=[" w7", " w7 w8"])
    for prefix in ("exact", "activated", "detached"):
        invocation = encode_invocation(" w20 w21", tokenizer, prefix_mode=prefix)
        encoded = encode(text, tokenizer, invocation=invocation)
        assert encoded.rows.tokens == ((5, 6, 20, 21, 7), (20, 21, 7, 8))
        assert encoded.rows.prompt_lens == (4, 2)
        assert encoded.rows.prefix_lens == ((0, 0) if prefix == "exact" else (2, 0))
        ids = mezo.Batch(prompts=[[5, 6], []], completions=[[7], [7, 8]])
        assert encode(ids, None, invocation=invocation) == encoded
    given = encode_invocation((20, 21), None, prefix_mode="detached")
    assert encode(text, tokenizer, invocation=given) == encoded
    with pytest.raises(ValueError, match="invocation must be token ids where there is no"):
        encode_invocation("w5", None, prefix_mode="detached")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": [], "completions": []}, "at least one prompt, got none"),
        ({"prompts": ["a"]}, "exactly one of completions and options .* got neither"),
        (
            {"prompts": ["a"], "completions": ["b"], "options": ["b", "c"], "labels": [0]},
            "exactly one of completions and options .* got both",
        ),
        ({"prompts": ["a"], "completions": ["b", "c"]}, "completions must have one entry for each"),
        ({"prompts": ["a"], "completions": ["b"], "labels": [0]}, "labels must come with options"),
        ({"prompts": ["a"], "options": ["b", "c"]}, "options must come with labels, got none"),
        ({"prompts": ["a"], "options": ["b", "c"], "labels": [0, 1]}, "labels must have one entry"),
        ({"prompts": ["a"], "options": ["b"], "labels": [0]}, "at least 2 options, got 1"),
        (
            {"prompts": ["a"], "options": ["b", "c"], "labels": [2]},
            r"labels\[0\] must name one of the 2 options, got 2",
        ),
        (
            {"prompts": ["a"], "options": [["b", "c"], ["d", "e"]], "labels": [0]},
            "options must have one entry for each of the 1 prompts, got 2",
        ),
    ],
)
def test_bad_batches_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        mezo.Batch(**fields)


def test_bad_rows_raise(tokenizer):
    for fields, message in (
        ({"prompts": [[1]], "completions": [[]]}, "row 0 must have at least one completion token"),
        ({"prompts": [""], "completions": ["w5"]}, "row 0 must have at least one prompt token"),
        ({"prompts": [[1] * 9], "completions": [[2]]}, "at most 8 tokens .* got 10"),
        ({"prompts": [[1]], "completions": [[100]]}, "vocabulary of 100, got 1..100"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(mezo.Batch(**fields), tokenizer, max_row_tokens=8, vocab_size=100)
    unknown = mezo.Batch(prompts=["w5"], options=["awful", "great"], labels=[0])
    with pytest.raises(ValueError, match="options of prompt 0 must have different tokens"):
        encode(unknown, tokenizer)
    with pytest.raises(ValueError, match="text needs a tokenizer, got none"):
        encode(mezo.Batch(prompts=["a"], completions=["b"]), None)
