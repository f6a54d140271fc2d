"""The engine on a plain Hugging Face model: the truth for tests and the fallback without SGLang."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from mezo.config import MezoConfig
from mezo.core import Scores, StepReply, StepRequest, pair_slots, run_step
from mezo.data import BASE, THETA, Rows
from mezo.state import AdapterState
from mezo_kernels import TensorSpec

_PAD = 0


class _LoraLinear(torch.nn.Module):
    """A linear layer with one adapter slot switched on at a time (or none: the base model)."""

    def __init__(self, base: torch.nn.Linear, config: MezoConfig, slots: Sequence[str]) -> None:
        super().__init__()
        self.base = base
        self.scaling = config.scaling
        self.active: str = BASE
        self.prefix: str = BASE  # the slot that prefix tokens run under
        self.is_prefix: torch.Tensor | None = None  # [N, T, 1] bool, or None: no prefixes
        shapes = {"A": (config.rank, base.in_features), "B": (base.out_features, config.rank)}
        self.slots = {
            slot: {
                factor: torch.zeros(shape, dtype=base.weight.dtype, device=base.weight.device)
                for factor, shape in shapes.items()
            }
            for slot in slots
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D_in] -> [..., D_out]."""
        y: torch.Tensor = self.base(x)
        if self.is_prefix is None:
            return y + self._delta(x, self.active)
        return y + torch.where(
            self.is_prefix, self._delta(x, self.prefix), self._delta(x, self.active)
        )

    def _delta(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The adapter's part of the output; nothing for the base model."""
        if name == BASE:
            return torch.zeros((), dtype=x.dtype, device=x.device)
        slot = self.slots[name]
        return F.linear(F.linear(x, slot["A"]), slot["B"]) * self.scaling


class TransformersSession:
    """An adapter on a Hugging Face causal language model, in this process.

    The target modules are wrapped when the session starts and put back when it is closed. Rows are
    padded on the right and run once for each slot.

    Args:
        model: a causal language model in eval mode.
        config: the run's configuration.
        tokenizer: the model's tokenizer, or None for batches of token ids.

    Raises:
        ValueError: a target module that the model does not have as a linear layer.
    """

    engine_name = "transformers"

    def __init__(self, model: Any, config: MezoConfig, tokenizer: Any = None) -> None:
        self.versions = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        self.model = model
        self.tokenizer = tokenizer
        self.model_path = str(getattr(model, "name_or_path", "") or "")
        self.max_row_tokens = int(model.config.max_position_embeddings)
        self.vocab_size = int(model.config.vocab_size)
        self._was_training = bool(model.training)
        model.eval()  # dropout would differ between the two signs
        slots = [*pair_slots(config.num_directions), THETA]
        self._layers = _wrap(model, config, slots)
        specs, views = [], {slot: [] for slot in slots}  # type: ignore[var-annotated]
        for name, layer in self._layers.items():
            for factor in ("A", "B"):
                rows, cols = layer.slots[THETA][factor].shape
                specs.append(TensorSpec(f"{name}.lora_{factor}", (rows, cols)))
                for slot in slots:
                    views[slot].append(layer.slots[slot][factor])
        self.state = AdapterState(
            specs,
            seed=config.seed,
            distribution=config.distribution,
            pairs=[(views[f"plus{k}"], views[f"minus{k}"]) for k in range(config.num_directions)],
            theta=views[THETA],
            device=model.device,
        )
        self.state.publish()

    def step(self, request: StepRequest) -> StepReply:
        """See `Session.step`."""
        return run_step(self.state, self._score, request)

    def score(self, rows: Rows, slot: str) -> Scores:
        """See `Session.score`."""
        if slot == THETA:
            self.state.publish()
        return self._score(rows, [slot])

    def apply_update(self, step: int, coefficients: Sequence[float]) -> None:
        """See `Session.apply_update`."""
        self.state.defer_update(step, coefficients)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Session.weights`."""
        self.state.flush()
        pairs = zip(self.state.specs, self.state.masters, strict=True)
        return {spec.name: master.detach().cpu().clone() for spec, master in pairs}

    def close(self) -> None:
        """Put the wrapped layers back."""
        for name, layer in self._layers.items():
            self.model.set_submodule(name, layer.base)
        self._layers = {}
        self.model.train(self._was_training)

    @torch.inference_mode()
    def _score(self, rows: Rows, slots: Sequence[str]) -> Scores:
        """Run the rows under each slot, one forward a slot, nothing shared.

        A prefix runs under an adapter of its own (none, for an activated one), token by token in
        one forward: later tokens then attend to the keys and values that this gives.
        """
        shape = (len(rows), max(map(len, rows.tokens)))
        ids = torch.full(shape, _PAD, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        scored = torch.zeros(shape, dtype=torch.bool)
        is_prefix = torch.zeros((*shape, 1), dtype=torch.bool)
        for i, row in enumerate(rows.tokens):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            scored[i, rows.prompt_lens[i] : len(row)] = True
            is_prefix[i, : rows.prefix_lens[i]] = True
        ids, mask, scored, is_prefix = (
            t.to(self.model.device) for t in (ids, mask, scored, is_prefix)
        )
        sums: dict[str, list[float]] = {}
        for slot in slots:
            with self._switched_to(
                slot, rows.prefix_adapter, is_prefix if any(rows.prefix_lens) else None
            ):
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            sums[slot] = _logprob_sums(logits, ids, scored)
        return Scores(sums, tokens=len(slots) * ids.numel(), forwards=len(slots))

    @contextmanager
    def _switched_to(
        self, slot: str, prefix: str = BASE, is_prefix: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Let the adapted layers use ``slot``, and ``prefix`` for prefix tokens."""
        for layer in self._layers.values():
            layer.active, layer.prefix, layer.is_prefix = slot, prefix, is_prefix
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.active, layer.prefix, layer.is_prefix = BASE, BASE, None


def _logprob_sums(logits: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor) -> list[float]:
    """Sum of the log-likelihoods of the scored tokens of each row; fp32, sums in float64."""
    where = scored[:, 1:]
    picked = logits[:, :-1][where].float().log_softmax(-1)
    values = picked.gather(-1, ids[:, 1:][where][:, None])[:, 0].double()
    row = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(where)[where]
    sums = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
    return list(sums.index_add_(0, row, values).tolist())


def _wrap(model: Any, config: MezoConfig, slots: Sequence[str]) -> dict[str, _LoraLinear]:
    """Replace the target modules by adapted ones; returns them in the model's order."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in config.target_modules
    }
    known = {name.rsplit(".", 1)[-1] for name in found}
    wrong = sorted(set(config.target_modules) - known)
    if wrong:
        modules = model.named_modules()
        linears = {n.rsplit(".", 1)[-1] for n, m in modules if isinstance(m, torch.nn.Linear)}
        raise ValueError(
            f"attach: target_modules must name linear layers of the model, got {wrong}; "
            f"it has {sorted(linears - {'lm_head'})}."
        )
    for name, module in found.items():
        if not isinstance(module, torch.nn.Linear):
            raise ValueError(
                f"attach: {name} must be a linear layer, got {type(module).__name__}; "
                "detach the adapter that is already on the model, or choose other target_modules."
            )
    layers = {name: _LoraLinear(module, config, slots) for name, module in found.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers
