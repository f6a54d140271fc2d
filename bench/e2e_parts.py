"""Model shapes with random weights, batches of random tokens, and the paper's loop on them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch

import mezo
from bench.shapes import MODELS
from mezo import objectives
from mezo.core.rows import THETA
from mezo.engines.transformers import TransformersSession


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder with random weights.

    Args:
        name: what it is called.
        kind: "opt" or "llama".
        layers, hidden, ffn, heads, kv_heads, vocab: its sizes.
        targets: the modules that are trained.
    """

    name: str
    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def vocab_used(self) -> int:
        """Random token ids lie below it."""
        return min(self.vocab, 8000)

    def config(self) -> Any:
        """The Hugging Face configuration."""
        from transformers import LlamaConfig, OPTConfig

        common = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.kind == "opt":
            return OPTConfig(
                **common, ffn_dim=self.ffn, word_embed_proj_dim=self.hidden, pad_token_id=0
            )
        return LlamaConfig(**common, intermediate_size=self.ffn, tie_word_embeddings=False)

    def write(self, directory: str, *, with_weights: bool) -> None:
        """Write config.json, and random fp32 weights if wanted."""
        config = self.config()
        config.architectures = ["OPTForCausalLM" if self.kind == "opt" else "LlamaForCausalLM"]
        if with_weights:
            self.make(config).float().save_pretrained(directory)
        else:
            config.save_pretrained(directory)

    def make(self, config: Any) -> Any:
        """The model, on torch's default device and dtype."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config).eval()

    def random_model(self, device: str) -> Any:
        """The model with random weights, in the dtype that the engine has on this device."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return self.make(self.config())
        finally:
            torch.set_default_dtype(before)

    def num_parameters(self) -> int:
        """Weights in all, without biases and norms."""
        kv = self.hidden // self.heads * self.kv_heads
        mlp = (2 if self.kind == "opt" else 3) * self.hidden * self.ffn
        layer = 2 * self.hidden * self.hidden + 2 * self.hidden * kv + mlp
        return self.layers * layer + self.vocab * self.hidden * (1 if self.kind == "opt" else 2)


def shapes() -> dict[str, Shape]:
    """The shapes by name; `tiny` is for trying the program on a CPU."""
    vocabs = {"opt-1.3b": (32, 50272), "opt-13b": (40, 50272), "llama-3.1-8b": (32, 128256)}
    found = {"tiny": Shape("tiny", "llama", 2, 64, 128, 4, 2, 512)}
    for name, (heads, vocab) in vocabs.items():
        model = MODELS[name]
        found[name] = Shape(
            name=name,
            kind="llama" if model.is_gated else "opt",
            layers=model.layers,
            hidden=model.hidden,
            ffn=model.ffn,
            heads=heads,
            kv_heads=heads * model.kv // model.q,
            vocab=vocab,
        )
    return found


# Small enough for float32 on a CPU, deep enough for bfloat16 to accumulate error.
AGREEMENT_SHAPE = Shape("agreement", "llama", 8, 256, 512, 4, 2, 1024)


def make_config(**changes: Any) -> mezo.MeZOConfig:
    """LoRA r 8 on q, v, with an invocation of three tokens."""
    return mezo.MeZOConfig(rank=8, alpha=16, invocation=(11, 12, 13), **changes)


def make_batch(
    rng: random.Random, size: int, prompt_tokens: tuple[int, int], vocab: int
) -> mezo.Batch:
    """Random prompts and one-token completions, the loss over the whole vocabulary."""

    def ids(count: int) -> list[int]:
        return [rng.randrange(20, vocab) for _ in range(count)]

    prompts = [ids(rng.randint(*prompt_tokens)) for _ in range(size)]
    return mezo.Batch(prompts=prompts, completions=[ids(1) for _ in prompts])


class PaperLoop:
    """Algorithm 1 as the paper's code runs it: perturb in place by seed; four passes of z a step.

    A subclass says what ``loss()`` is.
    """

    def __init__(self, parameters: list[torch.Tensor], config: mezo.MeZOConfig) -> None:
        self.parameters = parameters
        self.config = config
        self.seed = 0

    def loss(self) -> float:
        raise NotImplementedError

    def perturb(self, scale: float) -> None:
        torch.manual_seed(self.seed)
        for parameter in self.parameters:
            z = torch.normal(
                0.0, 1.0, parameter.shape, device=parameter.device, dtype=parameter.dtype
            )
            parameter.data.add_(z, alpha=scale)

    @torch.inference_mode()
    def step(self) -> None:
        self.seed += 1
        eps = self.config.eps
        self.perturb(eps)
        loss_plus = self.loss()
        self.perturb(-2 * eps)
        loss_minus = self.loss()
        self.perturb(eps)
        self.perturb(-self.config.lr * (loss_plus - loss_minus) / (2 * eps))


class PlainLoop(PaperLoop):
    """The paper's loop on one LoRA slot of a `transformers` run, one padded forward a sign."""

    def __init__(self, run: mezo.Run, batch: mezo.Batch) -> None:
        session = run.session
        assert isinstance(session, TransformersSession)
        layers = session._layers.values()
        super().__init__([t for layer in layers for t in layer.slots[THETA].values()], run.config)
        self.session = session
        self.encoded = run.encode(batch)

    def loss(self) -> float:
        scores = self.session._score(self.encoded.rows, [THETA])
        targets = self.encoded.targets
        return objectives.of(targets).loss(targets, scores.logprob_sums[THETA])
