"""Runs a batch and computes token log-likelihoods from its last hidden states: scalars out.

SGLang's logits processor computes a row of logits for the last token of every request, and of every
token whose log-likelihood is asked for. During our forward a `LogprobProcessor` replaces it. It
uses only the hidden states of the loss positions, and only the labels' rows of lm_head where the
loss does not need the normaliser.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import torch

from mezo.engines.sglang.batch.attention import Grouping, PairedAttention
from mezo.engines.sglang.batch.cpu_layers import cpu_layers
from mezo.engines.sglang.batch.cpu_lora import segmented_lora
from mezo.engines.sglang.batch.patch import patched
from mezo.engines.sglang.compat import Rank
from mezo_kernels import label_logits, label_nll, label_nll_from_parts

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
    from sglang.srt.managers.schedule_batch import ScheduleBatch


class _LogitRule(TypedDict):
    """What a model does to its logits."""

    soft_cap: float
    logit_scale: float


@dataclass
class Wanted:
    """What to score in a batch: ``tokens[i]`` behind the token at ``positions[i]``.

    Args:
        positions: rows of the batch's hidden states.
        tokens: token ids.
        is_normalised: False where a logit will do: log-likelihoods that are only compared with
            others of the same position.
    """

    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_normalised: list[bool] = field(default_factory=list)

    def add(self, position: int, token: int, is_normalised: bool) -> None:
        """Ask for one more."""
        self.positions.append(position)
        self.tokens.append(token)
        self.is_normalised.append(is_normalised)


def check_lm_head(rank: Rank) -> None:
    """Raise unless log-likelihoods can be computed from the model's lm_head.

    Raises:
        NotImplementedError: a quantised lm_head, or one with a bias.
    """
    lm_head = getattr(rank.model, "lm_head", None)
    if lm_head is not None:
        _weight(lm_head)


@torch.inference_mode()
def run(
    rank: Rank,
    batch: ScheduleBatch,
    wanted: Wanted | None = None,
    grouping: Grouping | None = None,
) -> list[float]:
    """Run an allocated batch; returns the wanted log-likelihoods (nats), or none.

    With a grouping, prefixes are attended to as it says and the batch's own KV is not stored.

    Numerics: logits accumulated and normalised in fp32. The result of a row does not depend on the
    other rows of the batch's last hidden states.
    """
    runner, model = rank.runner, rank.model
    path = _logits_processor(model)
    processor: LogitsProcessor = model.get_submodule(path)
    rule: _LogitRule = {
        "soft_cap": float(processor.final_logit_softcapping or 0.0),
        "logit_scale": float(1.0 if processor.logit_scale is None else processor.logit_scale),
    }
    ours = LogprobProcessor(rank.tp_group, wanted or Wanted(), rule)
    # Prepares the LoRA backend for the batch, too.
    forward_batch = rank.forward_batch(batch)
    with ExitStack() as stack:
        if grouping is not None:
            attention = PairedAttention.around(runner.attn_backend)
            stack.enter_context(attention.paired(grouping))
            stack.enter_context(patched(runner, "attn_backend", attention))
        if getattr(runner, "prefill_cuda_graph_runner", None) is not None:
            # Its graphs were captured with the logits processor in them.
            stack.enter_context(patched(runner, "prefill_cuda_graph_runner", None))
        stack.enter_context(segmented_lora(runner.lora_manager.lora_backend))
        stack.enter_context(cpu_layers(runner))
        stack.callback(model.set_submodule, path, processor)
        model.set_submodule(path, ours)
        runner.forward(forward_batch)
    return ours.values


class LogprobProcessor(torch.nn.Module):
    """Replaces a model's logits processor during a forward; leaves its scores in ``values``."""

    def __init__(self, group: GroupCoordinator, wanted: Wanted, rule: _LogitRule) -> None:
        super().__init__()
        self.values: list[float] = []
        self._group = group  # the ranks that share the vocabulary
        self._wanted = wanted
        self._rule = rule

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        lm_head: ParallelLMHead,
        *_: object,
        **__: object,
    ) -> LogitsProcessorOutput:
        """What the model calls; it returns no logits."""
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        if len(hidden_states) != len(input_ids):
            raise RuntimeError(
                f"a batch's hidden states must be those of its {len(input_ids)} tokens, got "
                f"{len(hidden_states)}; turn off what spreads or pads them over ranks."
            )
        if self._wanted.positions:
            self._score(hidden_states, lm_head)
        return LogitsProcessorOutput(next_token_logits=None)

    def _score(self, hidden_states: torch.Tensor, lm_head: ParallelLMHead) -> None:
        weight, first = _weight(lm_head)
        device = weight.device
        positions = torch.tensor(self._wanted.positions, device=device)
        tokens = torch.tensor(self._wanted.tokens, device=device)
        is_normalised = torch.tensor(self._wanted.is_normalised, device=device)
        hidden = hidden_states[positions].to(weight.dtype)
        values = torch.empty(len(tokens), dtype=torch.float32, device=device)
        if any(self._wanted.is_normalised):
            values[is_normalised] = -self._nll(
                hidden[is_normalised], weight, first, tokens[is_normalised]
            )
        if not all(self._wanted.is_normalised):
            values[~is_normalised] = self._logits(
                hidden[~is_normalised], weight, first, tokens[~is_normalised]
            )
        self.values = values.tolist()

    def _nll(
        self, hidden: torch.Tensor, weight: torch.Tensor, first: int, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Negative log-likelihoods; each rank has a share of the vocabulary."""
        parts = label_nll(hidden, weight, tokens, vocab_start=first, partial=True, **self._rule)
        stacked = torch.stack(tuple(parts)).unsqueeze(0)
        if self._group.world_size > 1:
            stacked = self._group.all_gather(stacked, dim=0)
        return label_nll_from_parts([(m, s, t) for m, s, t in stacked])

    def _logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, first: int, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Logits of the tokens, from the ranks that have their rows of lm_head."""
        labels, column = tokens.unique(return_inverse=True)
        rows = labels - first
        is_here = (rows >= 0) & (rows < len(weight))
        logits = label_logits(hidden, weight, rows.clamp(0, len(weight) - 1), **self._rule)
        picked = logits.masked_fill(~is_here, 0.0).gather(1, column[:, None])[:, 0]
        if self._group.world_size == 1:
            return picked
        reduced: torch.Tensor = self._group.all_reduce(picked)
        return reduced


def _weight(lm_head: ParallelLMHead) -> tuple[torch.Tensor, int]:
    """This rank's rows of lm_head, and the token id of the first one."""
    base = getattr(lm_head, "base_layer", lm_head)
    weight = getattr(base, "weight", None)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if weight is None or weight.dtype not in dtypes or getattr(base, "bias", None) is not None:
        raise NotImplementedError(
            "attach: lm_head must be a plain matrix, got a quantised one or one with a bias "
            f"({type(base).__name__}); use a model whose lm_head is neither."
        )
    shard = base.shard_indices
    return weight[: shard.num_org_elements], int(shard.org_vocab_start_index)


def _logits_processor(model: torch.nn.Module) -> str:
    """Path of the model's logits processor."""
    from sglang.srt.layers.logits_processor import LogitsProcessor

    # It is mostly the model's own child; a walk through all layers would cost a millisecond.
    modules = itertools.chain(model.named_children(), model.named_modules())
    path: str = next(name for name, module in modules if isinstance(module, LogitsProcessor))
    return path
