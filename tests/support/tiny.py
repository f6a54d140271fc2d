"""Tiny random checkpoints and random batches."""

from __future__ import annotations

import random

import torch
import transformers

import mezo
from mezo.core.messages import StepRequest
from mezo.core.rows import Rows
from mezo.objectives.base import Targets

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCAB = 512

_TINY = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
_TINY_OTHERS = {"num_key_value_heads": 2, "tie_word_embeddings": False}
# OPT has names of its own, and no grouped heads.
_TINY_OPT = {
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "init_std": 0.2,
    "pad_token_id": 0,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
_TINY_MORE = {
    "opt": _TINY_OPT,
    "phi3": {**_TINY_OTHERS, "pad_token_id": 0},
    "mistral": {**_TINY_OTHERS, "sliding_window": 8},
}


def save_tiny_model(architecture: str, directory: str) -> None:
    """Write a 2-layer random checkpoint with a tokenizer."""
    config_class, model_class = _TINY[architecture]
    torch.manual_seed(sum(map(ord, architecture)))
    config = config_class(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        **_TINY_MORE.get(architecture, _TINY_OTHERS),
    )
    model_class(config).float().eval().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def make_tokenizer():
    """A word-level tokenizer: "w5" is token 5."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "bad": 3, "good": 4}
    words |= {f"w{i}": i for i in range(len(words), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def load_model(directory: str):
    """The checkpoint as a plain fp32 Hugging Face model."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def random_batch(rng: random.Random, *, size: int = 4, kind: str = "completion") -> mezo.Batch:
    """A batch of random token ids: ragged prompts, ragged completions or 3 ragged options."""

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high))]

    prompts = [[1, *ids(1, 9)] for _ in range(size)]
    if kind == "completion":
        return mezo.Batch(prompts=prompts, completions=[ids(1, 4) for _ in prompts])

    def options() -> list[list[int]]:
        distinct: dict[tuple[int, ...], None] = {}
        while len(distinct) < 3:
            distinct[tuple(ids(1, 3))] = None
        return [list(option) for option in distinct]

    return mezo.Batch(
        prompts=prompts,
        options=[options() for _ in prompts],
        labels=[rng.randrange(3) for _ in prompts],
    )


def raw_request(step: int, tokens: list[int], *, prefix_len: int = 0, eps: float = 1e-2):
    """A step on one row, past the checks that batches go through."""
    return StepRequest(
        step=step,
        rows=Rows((tuple(tokens),), (prefix_len,), (prefix_len + 1,), (True,)),
        targets=Targets(counts=(len(tokens) - prefix_len - 1,)),
        eps=eps,
        lr=1e-3,
    )
