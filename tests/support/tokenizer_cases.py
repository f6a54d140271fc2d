"""Tokenizers of the kinds that people use, trained on a few sentences."""

from __future__ import annotations

import transformers
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<|role|>", "<|end|>"]
SENTENCES = [
    "The movie was good. The movie was bad. A fine film, and yes, the answer was no.",
    "Answer: yes\nAnswer: no\nThe answer was: good\n\nIt was bad, it was not good.",
    "What was the movie? It was a film. Was it good? no. Was it bad? yes.",
    "wasbad goodbad. It was.\nIt was good.\nAnswer: no.\nIt was bad.\nThe film.\nyes",
]
# As Llama 3 and Qwen: punctuation takes the line breaks behind it.
QWEN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("byte", "qwen", "first", "always", "prepend", "word", "unigram")
POSTS = {"none": ([], []), "bos": ([1], []), "bos+eos": ([1], [2]), "eos": ([], [2])}


def trained(model, trainer, pre_tokenizer, decoder):
    """A tokenizer of its parts."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def bpe(pre_tokenizer, decoder):
    """A BPE tokenizer that knows every byte."""
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer, decoder)


def make_raw(kind):
    """A tokenizer of one of the kinds that people use."""
    if kind == "byte":
        return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    if kind == "qwen":
        split = pre_tokenizers.Split(Regex(QWEN), "isolated")
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return bpe(pre_tokenizers.Sequence([split, byte]), decoders.ByteLevel())
    blanks = decoders.Metaspace(prepend_scheme="never")
    if kind in ("first", "always"):
        return bpe(pre_tokenizers.Metaspace(prepend_scheme=kind), blanks)
    if kind == "prepend":  # as Llama 2: every text gets a blank, by the normalizer
        raw = bpe(pre_tokenizers.Metaspace(prepend_scheme="never"), blanks)
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        return raw
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
        return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), blanks)
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    model = models.WordLevel(unk_token="<unk>")
    return trained(model, trainer, pre_tokenizers.Whitespace(), decoders.WordPiece())


def wrapped(raw, post="none", **options):
    """The Hugging Face tokenizer of ``raw``, which adds special tokens as ``post`` says."""
    before, behind = POSTS[post]
    names = [[SPECIAL[i] for i in ids] for ids in (before, behind)]
    if before or behind:
        template = processors.TemplateProcessing(
            single=" ".join([*names[0], "$A", *names[1]]),
            special_tokens=[(SPECIAL[i], i) for i in before + behind],
        )
        raw.post_processor = (
            processors.Sequence([raw.post_processor, template]) if raw.post_processor else template
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **{**names, **options})


def make(kind, post="none"):
    """`wrapped` of `make_raw`."""
    return wrapped(make_raw(kind), post)
