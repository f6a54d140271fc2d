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
from mezo.engines.sglang.batch.prefill_graph import breakable_only
from mezo.engines.sglang.compat import Rank
from mezo_kernels import label_logits, label_nll

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

    Raises:
        RuntimeError: SGLang ran the batch past our attention or our logits processor.

    Numerics: logits accumulated and normalised in fp32. The result of a row does not depend on the
    other rows of the batch's last hidden states; on a GPU it does on whether `label_nll` gets more
    than 64 of them, which both signs share.
    """
    runner, model = rank.runner, rank.model
    path = _logits_processor(model)
    processor: LogitsProcessor = model.get_submodule(path)
    rule: _LogitRule = {
        "soft_cap": float(processor.final_logit_softcapping or 0.0),
        "logit_scale": float(1.0 if processor.logit_scale is None else processor.logit_scale),
    }
    ours = LogprobProcessor(rank.tp_group, wanted or Wanted(), rule)
    owner = model.get_submodule(path.rpartition(".")[0])
    if wanted is not None and hasattr(owner, "lm_head"):
        ours.prepare(owner.lm_head)
    # Prepares the LoRA backend for the batch, too.
    forward_batch = rank.forward_batch(batch)
    with ExitStack() as stack:
        if grouping is not None:
            attention = PairedAttention.around(runner.attn_backend)
            stack.enter_context(attention.paired(grouping))
            stack.enter_context(patched(runner, "attn_backend", attention))
        stack.enter_context(breakable_only(runner))
        stack.enter_context(segmented_lora(runner.lora_manager.lora_backend))
        stack.enter_context(cpu_layers(runner))
        stack.callback(model.set_submodule, path, processor)
        model.set_submodule(path, ours)
        runner.forward(forward_batch)
    return ours.result()


class LogprobProcessor(torch.nn.Module):
    """Replaces a model's logits processor during a forward; afterwards `result` has its scores.

    What it reads is on the device before the forward, and nothing in it waits for the device, so
    that the host is never behind while it scores.
    """

    def __init__(self, group: GroupCoordinator, wanted: Wanted, rule: _LogitRule) -> None:
        super().__init__()
        self._group = group  # the ranks that share the vocabulary
        self._wanted = wanted
        self._rule = rule
        self._places: _Places | None = None
        self._values: torch.Tensor | None = None

    def prepare(self, lm_head: ParallelLMHead) -> None:
        """Send what will be read to the device; the model calls with the same ``lm_head``."""
        self._places = _Places(self._wanted, lm_head)

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        lm_head: ParallelLMHead,
        *_: object,
        **__: object,
    ) -> LogitsProcessorOutput:
        """What the model calls; it returns no logits.

        A graph's batch is filled up: the rows behind its tokens are nobody's.
        """
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        if len(hidden_states) != len(input_ids):
            raise RuntimeError(
                f"a batch's hidden states must be those of its {len(input_ids)} tokens, got "
                f"{len(hidden_states)}; turn off what spreads or pads them over ranks."
            )
        self._values = self._score(hidden_states, lm_head)
        return LogitsProcessorOutput(next_token_logits=None)

    def result(self) -> list[float]:
        """The scores, in the order in which they were asked for; waits for the device.

        Raises:
            RuntimeError: the model did not call.
        """
        if self._values is None:
            raise RuntimeError(
                "a scoring batch must end in the model's logits processor, got a forward that did "
                "not call it; start the engine with cuda_graph_backend_prefill='disabled'."
            )
        order = [] if self._places is None else self._places.order
        scores: list[float] = self._values.tolist()
        return [score for _, score in sorted(zip(order, scores, strict=True))]

    def _score(self, hidden_states: torch.Tensor, lm_head: ParallelLMHead) -> torch.Tensor:
        """Log-likelihoods first, then logits."""
        if not self._wanted.positions:
            return torch.empty(0)
        if self._places is None or self._places.lm_head is not lm_head:
            self.prepare(lm_head)
        places = self._places
        assert places is not None
        weight, first = places.weight, places.first
        values = []
        if len(places.tokens):
            hidden = hidden_states.index_select(0, places.likely).to(weight.dtype)
            values.append(-self._nll(hidden, weight, first, places.tokens))
        if len(places.columns):
            hidden = hidden_states.index_select(0, places.only_logits).to(weight.dtype)
            values.append(self._logits(hidden, weight, places))
        return torch.cat(values)

    def _nll(
        self, hidden: torch.Tensor, weight: torch.Tensor, first: int, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Negative log-likelihoods; each rank has a share of the vocabulary."""
        gather = self._gather if self._group.world_size > 1 else None
        return label_nll(hidden, weight, tokens, vocab_start=first, all_gather=gather, **self._rule)

    def _gather(self, parts: torch.Tensor) -> torch.Tensor:
        """Parts of the losses from all ranks, in their order."""
        gathered: torch.Tensor = self._group.all_gather(parts.unsqueeze(0), dim=0)
        return gathered

    def _logits(self, hidden: torch.Tensor, weight: torch.Tensor, places: _Places) -> torch.Tensor:
        """Logits of the tokens, from the ranks that have their rows of lm_head."""
        logits = label_logits(hidden, weight, places.labels, **self._rule)
        picked = logits.gather(1, places.columns[:, None])[:, 0]
        if places.is_elsewhere is not None:
            picked = picked.masked_fill(places.is_elsewhere != 0, 0.0)
        if self._group.world_size == 1:
            return picked
        reduced: torch.Tensor = self._group.all_reduce(picked)
        return reduced


class _Places:
    """Where a batch's scores come from, on the device: one transfer that nobody waits for.

    Args:
        wanted: what to score.
        lm_head: the model's.

    Attributes:
        order: of each score, its place in ``wanted``; log-likelihoods first, then logits.
        weight: this rank's rows of lm_head.
        first: token id of the first one.
        likely: rows of the hidden states that log-likelihoods need.
        tokens: their token ids.
        only_logits: rows of the hidden states that logits need.
        labels: the rows of ``weight`` that the logits need, each once.
        columns: of each logit, its place in ``labels``.
        is_elsewhere: of each logit, 1 where another rank has its row; None where none has.
    """

    def __init__(self, wanted: Wanted, lm_head: ParallelLMHead) -> None:
        self.lm_head = lm_head
        self.weight, self.first = _weight(lm_head)
        likely: list[int] = []
        logits: list[int] = []
        for i, is_normalised in enumerate(wanted.is_normalised):
            (likely if is_normalised else logits).append(i)
        self.order = likely + logits
        labels = sorted({wanted.tokens[i] for i in logits})
        column_of = {label: column for column, label in enumerate(labels)}
        columns = [column_of[wanted.tokens[i]] for i in logits]
        last = len(self.weight) - 1
        rows = [min(max(label - self.first, 0), last) for label in labels]
        is_elsewhere = [
            int(row + self.first != label) for row, label in zip(rows, labels, strict=True)
        ]
        self.likely, self.tokens, self.only_logits, self.labels, self.columns, elsewhere = _send(
            self.weight.device,
            [wanted.positions[i] for i in likely],
            [wanted.tokens[i] for i in likely],
            [wanted.positions[i] for i in logits],
            rows,
            columns,
            [is_elsewhere[column] for column in columns],
        )
        self.is_elsewhere = elsewhere if any(is_elsewhere) else None


def _send(device: torch.device, *lists: list[int]) -> tuple[torch.Tensor, ...]:
    """Lists of numbers as tensors on a device, in one transfer that the host does not wait for."""
    table = torch.tensor(list(itertools.chain(*lists)), dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory()
    sizes = [len(numbers) for numbers in lists]
    sent: tuple[torch.Tensor, ...] = table.to(device, non_blocking=True).split(sizes)
    return sent


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
