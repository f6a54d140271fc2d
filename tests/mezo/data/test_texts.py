"""Text as rows: the tokens of the joint text, and what serving sees before the split.

Expected rows are made by the tokenizer from the joint text, or written down; never by our encoder.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft.tuners.lora.variants import calculate_alora_offsets
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import mezo
from mezo.data.example import batch_of
from mezo.tasks import assets, rotten_tomatoes
from tests.support.tokenizer_cases import KINDS, POSTS, make, make_raw, wrapped

PROMPT, INVOCATION, COMPLETION = "A fine film.", " Answer:", " yes, good</s>"


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=50000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def attach(model):
    """A function (tokenizer, invocation, prefix) -> run."""
    runs = []

    def attach(tokenizer, invocation=None, prefix="exact"):
        if runs:
            runs.pop().close()
        config = mezo.MeZOConfig(rank=1, invocation=invocation, prefix=prefix)
        runs.append(mezo.attach(model, config, tokenizer=tokenizer))
        return runs[-1]

    yield attach
    if runs:
        runs.pop().close()


def one_row(run, prompt, completion):
    """(tokens, tokens that are not scored, tokens on the base model) of one row."""
    rows = run.encode(mezo.Batch(prompts=[prompt], completions=[completion])).rows
    return list(rows.tokens[0]), rows.prompt_lens[0], rows.prefix_lens[0]


@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_tokens_of_the_joint_text(attach, kind, post):
    tokenizer = make(kind, post)
    before, behind = POSTS[post]
    for prompt in (PROMPT, "The answer was good", "What was it?\n"):
        joint = plain(tokenizer, prompt + INVOCATION + COMPLETION)
        served = tokenizer(prompt + INVOCATION)["input_ids"]
        served = served[: len(served) - len(behind)]
        invocation = attach(tokenizer, INVOCATION, "activated").invocation.tokens
        for prefix in mezo.config.PREFIX_MODES:
            run = attach(tokenizer, INVOCATION, prefix)
            row, prompt_len, prefix_len = one_row(run, prompt, COMPLETION)
            assert row == before + joint
            assert row[:prompt_len] == served
            assert row[-1] == tokenizer.eos_token_id
            assert prefix_len == (0 if prefix == "exact" else prompt_len - len(invocation))
        # PEFT looks for the invocation in the same tokens.
        peft_config = SimpleNamespace(alora_invocation_tokens=list(invocation))
        offsets = calculate_alora_offsets(
            {"default": peft_config}, "default", torch.tensor([served])
        )
        assert offsets == [len(invocation)]


@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_tokenizers_own_special_tokens_go(attach, kind, post):
    tokenizer = make(kind, post)
    before, _ = POSTS[post]
    run = attach(tokenizer)
    for prompt, completion in (
        ("It was", " good</s>"),  # a model that learns to stop
        ("It was good</s>", " It was bad</s>"),
        ("It was good.</s> It was bad</s>", "</s>"),
        ("</s>", " It was"),
    ):
        row, prompt_len, _ = one_row(run, prompt, completion)
        assert row == before + plain(tokenizer, prompt + completion)
        assert row[:prompt_len] == before + plain(tokenizer, prompt)
    # Token ids behind a text: the text is still what it is.
    row, prompt_len, _ = one_row(run, "It was good</s>", [7, 2])
    assert row == [*before, *plain(tokenizer, "It was good</s>"), 7, 2]
    row, _, _ = one_row(run, [7, 2], "It was good</s>")
    assert row == [7, 2, *plain(tokenizer, "It was good</s>")]


@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_prompt_has_one_bos(attach, kind, post):
    tokenizer = make(kind, post)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "It was"}], tokenize=False)
    assert prompt == "<s>It was"
    run = attach(tokenizer)
    row, prompt_len, _ = one_row(run, prompt, " good")
    assert row == plain(tokenizer, prompt + " good")
    assert row[:prompt_len] == plain(tokenizer, prompt)
    assert row.count(1) == 1
    if "bos" in post:  # the whole rendered text may be the completion, too
        row, prompt_len, _ = one_row(run, "", "<s>It was good</s>")
        assert row == plain(tokenizer, "<s>It was good</s>")
        assert prompt_len == 1


def test_a_second_bos_of_serving_is_said_once(attach, caplog):
    run = attach(make("byte", "bos"))
    for prompt in ("It was", "<s>It was", "<s>It"):
        one_row(run, prompt, " good")
    said = [r.getMessage() for r in caplog.records if "puts another before" in r.getMessage()]
    assert len(said) == 1
    assert "send token ids" in said[0]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("word", "unigram")])
def test_a_completion_that_merges_is_counted_and_said_once(attach, kind, caplog):
    tokenizer = make(kind, "bos")
    completions = ["yes", "no", "good"]
    batch = mezo.Batch(prompts=["The answer was: "] * 3, completions=completions)
    run = attach(tokenizer)
    with caplog.at_level(logging.WARNING):
        rows = run.encode(batch).rows
        run.encode(batch)
    served = tokenizer("The answer was: ")["input_ids"]
    for row, prompt_len, completion in zip(rows.tokens, rows.prompt_lens, completions, strict=True):
        assert list(row[:prompt_len]) == served
        assert tokenizer.decode(row[prompt_len:]) == completion
        # No blank of its own, and what the tokenizer makes of the word inside a text.
        inside = plain(tokenizer, f"\n{completion}")[len(plain(tokenizer, "\n")) :]
        assert list(row[prompt_len:]) == inside
    assert run.num_apart == 6
    (message,) = [r.getMessage() for r in caplog.records]
    assert "'The answer was: ' | 'yes', which the tokenizer joins" in message
    assert "run.num_apart" in message


@pytest.mark.parametrize("kind", ["byte", "first", "prepend"])
def test_an_invocation_that_ends_in_a_blank(attach, kind):
    tokenizer = make(kind, "bos")
    run = attach(tokenizer, " The answer was: ", "activated")
    prompt = "A fine film."
    row, prompt_len, prefix_len = one_row(run, prompt, "yes")
    served = tokenizer(prompt + " The answer was: ")["input_ids"]
    assert row[:prompt_len] == served
    assert tuple(row[prefix_len:prompt_len]) == run.invocation.tokens
    assert row[:prefix_len] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(row[prompt_len:]) == "yes"
    assert run.num_apart == 1


@pytest.mark.parametrize("kind", ["byte", "first", "always", "prepend"])
def test_an_invocation_without_a_blank_gets_none(attach, kind):
    # Alone, three of these tokenizers put a blank before it, and serving would never find it.
    tokenizer = make(kind, "bos")
    run = attach(tokenizer, "#Answer:", "activated")
    for prompt in ("A fine film.", "The movie was good"):
        row, prompt_len, prefix_len = one_row(run, prompt, " yes</s>")
        assert row == tokenizer(f"{prompt}#Answer: yes</s>")["input_ids"]
        assert row[:prompt_len] == tokenizer(f"{prompt}#Answer:")["input_ids"]
        assert tuple(row[prefix_len:prompt_len]) == run.invocation.tokens
        assert row[:prefix_len] == tokenizer(prompt)["input_ids"]


def test_an_invocation_that_merges_is_refused_where_it_would_not_be_found(attach):
    tokenizer = make("qwen")
    invocation = "\nAnswer:"
    tokens = plain(tokenizer, f"a{invocation}")[1:]
    run = attach(tokenizer, invocation, "activated")
    assert list(run.invocation.tokens) == tokens
    row, prompt_len, prefix_len = one_row(run, "It was good", " yes")
    assert row[prefix_len:prompt_len] == tokens
    served = plain(tokenizer, f"It was good.{invocation}")
    assert served[-len(tokens) :] != tokens  # ".\n" is one token
    with pytest.raises(
        ValueError, match=r"row 1 must end with the invocation's tokens.* got other tokens"
    ):
        run.encode(mezo.Batch(prompts=["It was", "It was good."], completions=[" yes", " no"]))
    # An ordinary adapter needs no tokens to be found: the text is just the prompt's end.
    row, prompt_len, _ = one_row(attach(tokenizer, invocation), "It was good.", " yes")
    assert row == plain(tokenizer, f"It was good.{invocation} yes")
    assert row[:prompt_len] == served
    run = attach(tokenizer, invocation, "detached")
    row, prompt_len, prefix_len = one_row(run, "It was good.", " yes")
    assert row[:prompt_len] == served
    assert row[:prefix_len] == plain(tokenizer, "It was good")


def test_options_of_a_prompt_are_tokenised_alike(attach):
    tokenizer = make("byte")
    run = attach(tokenizer)
    batch = mezo.Batch(prompts=["It w"], options=["as", " good"], labels=[1])
    with pytest.raises(ValueError, match=r"options of prompt 0 must all begin .*'It w' \| 'as'"):
        run.encode(batch)
    run.encode(mezo.Batch(prompts=["It was"], options=[" bad", " good"], labels=[1]))
    assert run.num_apart == 0
    batch = mezo.Batch(prompts=["It was "] * 2, options=["bad", "good"], labels=[1, 0])
    rows = run.encode(batch).rows
    assert run.num_apart == 4
    served = tuple(plain(tokenizer, "It was "))
    assert {row[:n] for row, n in zip(rows.tokens, rows.prompt_lens, strict=True)} == {served}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_as_invocation(attach, kind):
    tokenizer = make(kind, "bos")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|role|>", "<|end|>"]})
    invocation = "<|role|>answer<|end|>"
    run = attach(tokenizer, invocation, "activated")
    for prompt in ("It was good.", "It was ", "It was\n", "It was good</s>", ""):
        for completion in (" yes</s>", "yes", "\nyes"):
            row, prompt_len, prefix_len = one_row(run, prompt, completion)
            assert row == tokenizer(f"{prompt}{invocation}{completion}")["input_ids"]
            assert row[:prompt_len] == tokenizer(prompt + invocation)["input_ids"]
            assert tuple(row[prefix_len:prompt_len]) == run.invocation.tokens
    assert run.invocation.tokens[0] == tokenizer.convert_tokens_to_ids("<|role|>")
    assert run.invocation.tokens[-1] == tokenizer.convert_tokens_to_ids("<|end|>")


def test_an_empty_prompt_before_an_invocation(attach):
    for kind in KINDS:
        tokenizer = make(kind, "bos")
        run = attach(tokenizer, INVOCATION, "activated")
        row, prompt_len, prefix_len = one_row(run, "", " yes")
        assert row == tokenizer(f"{INVOCATION} yes")["input_ids"]
        assert tuple(row[prefix_len:prompt_len]) == run.invocation.tokens
        # The blank before every text is a token of its own there, and not the invocation's.
        assert prefix_len == (2 if kind == "prepend" else 1)


def word_pieces():
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "it": 3, "yes": 4, "##yes": 5, ".": 6, "a": 7}
    raw = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrapped(raw, "bos+eos")


def test_an_invocation_whose_tokens_depend_on_the_prompt_is_refused(attach):
    with pytest.raises(ValueError, match=r"same tokens behind every prompt, got 'yes', which has"):
        attach(word_pieces(), "yes", "activated")
    # The failed attempt has left nothing on the model.
    assert attach(word_pieces(), " yes", "activated").invocation.tokens == (4,)
    with pytest.raises(ValueError, match=r"got 'xyz', which merges with what stands before"):
        attach(PairTokenizer(), "xyz", "activated")
    with pytest.raises(ValueError, match=r"must have at least one token, got '\\n' with none"):
        attach(word_pieces(), "\n", "activated")


def test_normalizers(attach):
    # Spans are of the text as it was written: two characters for one, capitals for small letters.
    for tokenizer in (word_pieces(), wrapped(normalised(make_raw("byte")), "bos")):
        run = attach(tokenizer, " YES", "activated")
        for prompt, completion in (("It. e\u0301 A.", " YES. it"), ("IT E\u0301", " e\u0301 yes")):
            row, prompt_len, prefix_len = one_row(run, prompt, completion)
            assert row == [1, *plain(tokenizer, f"{prompt} YES{completion}")]
            assert row[:prompt_len] == [1, *plain(tokenizer, f"{prompt} YES")]
            assert row[:prefix_len] == [1, *plain(tokenizer, prompt)]
    # A letter and its accent, on two sides of the border, are one character of the joint text.
    run = attach(tokenizer)
    row, prompt_len, _ = one_row(run, "it e", "\u0301. a")
    assert row[:prompt_len] == [1, *plain(tokenizer, "it e")]
    assert tokenizer.decode(row[prompt_len:]) == "\u0301. a"
    assert run.num_apart == 1


def normalised(raw):
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return raw


def test_one_unknown_token_for_both_sides_does_not_swallow_a_completion(attach):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "it": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    run = attach(wrapped(raw))
    # "#" is <unk>, and so is "##".
    assert one_row(run, "it #", "# it")[:2] == ([3, 0, 0, 3], 2)
    assert run.num_apart == 1


@pytest.mark.parametrize("strip", ["lstrip", "rstrip"])
@pytest.mark.parametrize("kind", ["byte", "first"])
def test_special_tokens_that_swallow_blanks(attach, kind, strip):
    tokenizer = make(kind, "bos")
    token = AddedToken("<|role|>", special=True, **{strip: True})
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    role = tokenizer.convert_tokens_to_ids("<|role|>")
    run = attach(tokenizer, "<|role|>\n", "activated")
    for prompt in ("It was good.", "It was good. "):
        row, prompt_len, _ = one_row(run, prompt, " yes")
        served = tokenizer(f"{prompt}<|role|>\n")["input_ids"]
        assert row[:prompt_len] == served
        assert row == tokenizer(f"{prompt}<|role|>\n yes")["input_ids"]
        assert served[len(served) - len(run.invocation.tokens)] == role


def test_settings_of_the_tokenizer_do_not_change_rows(attach):
    raw = make_raw("byte")
    raw.enable_truncation(max_length=3)
    raw.enable_padding(length=64, pad_id=0, pad_token="<unk>")
    options = {"clean_up_tokenization_spaces": True, "pad_token": "<unk>", "model_max_length": 4}
    tokenizer = wrapped(raw, "bos", **options)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    row, prompt_len, _ = one_row(attach(tokenizer), "The movie was good . Was it", " bad ?")
    expected = make("byte", "bos")
    assert row == expected("The movie was good . Was it bad ?")["input_ids"]
    assert row[:prompt_len] == expected("The movie was good . Was it")["input_ids"]


def test_eos_that_the_tokenizer_appends_is_said_once(attach, caplog):
    run = attach(make("byte", "bos+eos"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            one_row(run, "It was", " good")
        attach(make("byte", "bos")).encode(mezo.Batch(prompts=["It was"], completions=[" bad"]))
    (message,) = [r.getMessage() for r in caplog.records]
    assert "puts the tokens [2] behind every text" in message


class PairTokenizer(transformers.PreTrainedTokenizer):
    """A slow tokenizer, of pairs of characters; it does not say where tokens come from."""

    def __init__(self, **kwargs):
        self._ids = {"<s>": 1, "</s>": 2}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<s>", **kwargs)

    @property
    def vocab_size(self):
        return 50000

    def get_vocab(self):
        return dict(self._ids)

    def _tokenize(self, text, **kwargs):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        return self._ids.setdefault(token, len(self._ids) + 3)

    def build_inputs_with_special_tokens(self, ids, other=None):
        return [1, *ids, 2]


def test_slow_tokenizers(attach):
    tokenizer = PairTokenizer()
    run = attach(tokenizer)
    row, prompt_len, _ = one_row(run, "abcd", "ef</s>")
    assert row == [1, *plain(tokenizer, "abcdef</s>")]
    assert row[:prompt_len] == [1, *plain(tokenizer, "abcd")]
    assert row[-1] == 2
    with pytest.raises(ValueError, match=r"completion of row 0 must begin at .*'abc' \| 'def'"):
        one_row(run, "abc", "def")
    run = attach(tokenizer, "<s>xy", "activated")
    row, prompt_len, prefix_len = one_row(run, "abc", "ef")
    assert row == [1, *plain(tokenizer, "abc<s>xyef")]
    assert row[:prefix_len] == [1, *plain(tokenizer, "abc")]
    assert tuple(row[prefix_len:prompt_len]) == run.invocation.tokens


@pytest.fixture(scope="module")
def smollm():
    directory = assets.cache_dir() / "SmolLM2-135M-Instruct"
    if not (directory / "tokenizer.json").exists():
        pytest.skip("SmolLM2 is not in the cache")
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_smollm_rows_of_rotten_tomatoes(attach, smollm):
    try:
        splits = rotten_tomatoes.load()
    except assets.AssetError as error:
        pytest.skip(str(error))
    task = rotten_tomatoes.TASK
    examples = splits.dev + splits.test
    run = attach(smollm, task.invocation, "activated")
    rows = run.encode(batch_of(examples)).rows
    # Parts tokenised one by one: this tokenizer never merges at a blank.
    prompts = smollm([e.prompt for e in examples])["input_ids"]
    words = smollm([task.invocation, *rotten_tomatoes.OPTIONS])["input_ids"]
    assert words[0] == list(run.invocation.tokens)
    expected = [(*p, *words[0], *word) for p in prompts for word in words[1:]]
    assert list(rows.tokens) == expected
    assert list(rows.prefix_lens) == [len(p) for p in prompts for _ in words[1:]]
    assert list(rows.prompt_lens) == [len(p) + 3 for p in prompts for _ in words[1:]]


def test_smollm_chats_and_ends(attach, smollm):
    chat = [{"role": "user", "content": "Was it good?"}]
    prompt = smollm.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    run = attach(smollm)
    row, prompt_len, _ = one_row(run, prompt, "Yes, it was.<|im_end|>")
    assert row[:prompt_len] == smollm.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert row == plain(smollm, prompt + "Yes, it was.<|im_end|>")
    assert row[-1] == smollm.eos_token_id
