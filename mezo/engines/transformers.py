"""The engine on a plain Hugging Face model: the reference in tests, and for use without SGLang."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mezo._host import fp32_products, warn_of_products
from mezo._inputs import one_line
from mezo._logging import show_warnings
from mezo.config import MeZOConfig
from mezo.core.messages import Check, ProgressReply, StepReply, StepRequest
from mezo.core.rows import THETA, Rows, Scores, run_slots
from mezo.core.state import AdapterSlot, AdapterState
from mezo.core.step import run_step
from mezo.data.encode import encode_invocation
from mezo.engines import EngineError
from mezo.engines.lora_layers import partners_of, wrap
from mezo.engines.selftest import engine_checks
from mezo.engines.sequences import TokenSequence, sequences_of
from mezo_kernels import TensorSpec

_PAD = 0
# Runs on one model share its layers, and so take turns.
_locks: WeakKeyDictionary[Any, AbstractContextManager[Any]] = WeakKeyDictionary()
# Of a model that was launched with a bound on the tokens of a forward.
_max_tokens: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class TransformersSession:
    """An adapter on a Hugging Face causal language model, in this process.

    The target modules are wrapped when the session starts and put back when it is closed. The
    distinct sequences of a batch are padded on the right and run once for each slot.

    Args:
        model: a causal language model in eval mode.
        config: the run's configuration.
        tokenizer: the model's tokenizer, or None for batches of token ids.

    Raises:
        ValueError: a target module that the model does not have as a linear layer.
    """

    engine_name = "transformers"

    def __init__(self, model: Any, config: MeZOConfig, tokenizer: Any = None) -> None:
        import transformers

        self.versions = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        self.model = model
        self.lock = _locks.setdefault(model, threading.RLock())
        if torch.device(model.device).type == "cpu" and model.dtype == torch.float32:
            warn_of_products(fp32_products(), "this process")
        self.tokenizer = tokenizer
        self.invocation = encode_invocation(config.invocation, tokenizer, prefix_mode=config.prefix)
        self.model_path = str(getattr(model, "name_or_path", "") or "")
        self.max_row_tokens = int(model.config.max_position_embeddings)
        self.vocab_size = int(model.config.vocab_size)
        self.dtype: torch.dtype = model.dtype
        self._was_training = bool(model.training)
        model.eval()  # dropout would differ between the two signs
        slots = run_slots(config.num_directions)
        self._layers = wrap(model, config, slots)
        self.partners = partners_of(model, self._layers, config.rank)
        try:
            self.state = self._new_state(config, slots)
        except BaseException:
            self.close()
            raise

    def _new_state(self, config: MeZOConfig, slots: Sequence[str]) -> AdapterState:
        """The adapter's masters, bound to the slots of the wrapped layers."""
        specs, views = [], {slot: [] for slot in slots}  # type: ignore[var-annotated]
        for name, layer in self._layers.items():
            for factor in ("A", "B"):
                rows, cols = layer.slots[THETA][factor].shape
                specs.append(TensorSpec(f"{name}.lora_{factor}", (rows, cols)))
                for slot in slots:
                    views[slot].append(layer.slots[slot][factor])
        return AdapterState(
            specs,
            seed=config.seed,
            distribution=config.distribution,
            slots=[AdapterSlot(slot, slot, views[slot]) for slot in slots],
            device=self.model.device,
        )

    def step(self, request: StepRequest) -> StepReply:
        """See `Session.step`."""
        return run_step(self.state, self._score, request)

    def score(self, rows: Rows, slot: str) -> Scores:
        """See `Session.score`."""
        return self._score(rows, [slot])

    def apply_updates(self, step: int, coefficients: Sequence[Sequence[float]]) -> None:
        """See `Session.apply_updates`."""
        self.state.take_steps(step, coefficients)

    def progress(self) -> ProgressReply:
        """See `Session.progress`."""
        return ProgressReply(self.state.steps, self.state.last_reply)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Session.weights`."""
        parts = self.state.unpack(*self.state.pack())
        return {spec.name: values.clone() for spec, values in parts}

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Session.set_weights`."""
        self.state.set_weights(weights)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefix_lens: Sequence[int],
        slot: str,
        *,
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[str],
    ) -> list[list[int]]:
        """See `Session.generate`: prompt by prompt, so that nothing is padded."""
        from transformers import GenerationConfig, StoppingCriteriaList

        ends = self._end_tokens()
        # All that a model's own generation_config.json might say otherwise.
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else 1.0,
            top_k=0 if temperature > 0 else None,
            top_p=1.0,
            repetition_penalty=1.0,
            num_beams=1,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else _PAD,
        )
        made = []
        for prompt, prefix_len in zip(prompts, prefix_lens, strict=True):
            ids = torch.tensor([list(prompt)], device=self.model.device)
            with self._generating(self.state.slot(slot).uid, len(prompt), prefix_len):
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([self._stops(stop, len(prompt))]),
                )
            made.append(out[0, len(prompt) :].tolist())
        return made

    def _stops(
        self, stop: Sequence[str], prompt_len: int
    ) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """Tell whether a stop text is in a continuation; transformers' own needs byte-level BPE."""

        def is_done(ids: torch.Tensor, _: Any) -> torch.Tensor:
            text = self.tokenizer.decode(ids[0, prompt_len:], skip_special_tokens=True)
            return torch.tensor([any(s in text for s in stop)], device=ids.device)

        return is_done

    def _end_tokens(self) -> list[int]:
        """The tokens that end a continuation, as SGLang knows them."""
        found: dict[int, None] = {}
        for holder in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            found.update(dict.fromkeys([ids] if isinstance(ids, int) else ids or []))
        return list(found)

    @contextmanager
    def _generating(self, uid: str | None, prompt_len: int, prefix_len: int) -> Iterator[None]:
        """Run a prompt's first tokens on the base model, and all others under a slot.

        Their keys and values stay in the model's cache, and what follows is run without them.
        """
        if uid is None or prefix_len == 0:
            with self._switched_to(uid):
                yield
            return
        is_prefix = torch.arange(prompt_len, device=self.model.device)[None, :, None] < prefix_len

        def prompt_is_done(*_: object) -> None:
            for layer in self._layers.values():
                layer.is_prefix = None

        with (
            self._switched_to(uid, None, is_prefix),
            self.model.register_forward_hook(prompt_is_done),
        ):
            yield

    def selftest(self, rows: Rows) -> list[Check]:
        """See `Session.selftest`."""
        return engine_checks(self.state, self._score, rows)

    def close(self) -> None:
        """Put the wrapped layers back."""
        for name, layer in self._layers.items():
            self.model.set_submodule(name, layer.base)
        self._layers = {}
        self.model.train(self._was_training)

    @torch.inference_mode()
    def _score(self, rows: Rows, slots: Sequence[str]) -> Scores:
        """Run the rows' sequences under each slot, one forward per slot, no keys or values shared.

        A prefix runs under an adapter of its own (none, for an activated one), token by token in
        one forward: later tokens then attend to the keys and values that this gives.
        """
        if self.model.training:
            raise ValueError(
                "step: the model must be in eval mode, got training mode, in which dropout differs "
                "between the two signs; call model.eval()."
            )
        whole = Scores({slot: [0.0] * len(rows) for slot in slots}, tokens=0, forwards=0)
        for sequences in _chunks(sequences_of(rows), _max_tokens.get(self.model)):
            part = self._score_sequences(sequences, rows, slots)
            for slot, sums in part.logprob_sums.items():
                whole.logprob_sums[slot] = [
                    a + b for a, b in zip(whole.logprob_sums[slot], sums, strict=True)
                ]
            whole = dataclasses.replace(
                whole,
                tokens=whole.tokens + part.tokens,
                forwards=whole.forwards + part.forwards,
            )
        return whole

    def _score_sequences(
        self, sequences: Sequence[TokenSequence], rows: Rows, slots: Sequence[str]
    ) -> Scores:
        """The part of some sequences in the rows' scores."""
        shape = (len(sequences), max(len(s.tokens) for s in sequences))
        ids = torch.full(shape, _PAD, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        is_prefix = torch.zeros((*shape, 1), dtype=torch.bool)
        places: dict[tuple[int, int], int] = {}
        read = []
        for i, sequence in enumerate(sequences):
            size = len(sequence.tokens)
            ids[i, :size] = torch.tensor(sequence.tokens)
            mask[i, :size] = 1
            is_prefix[i, : sequence.prefix_len] = True
            for scored in sequence.scored_tokens:
                index = places.setdefault((i, scored.position), len(places))
                read.append((index, scored.token, scored.row))
        where = torch.tensor(list(places)).unbind(1)
        place, token, row = torch.tensor(read).unbind(1)
        ids, mask, is_prefix = (t.to(self.model.device) for t in (ids, mask, is_prefix))
        sums: dict[str, list[float]] = {}
        has_prefix = any(rows.prefix_lens)
        for slot in slots:
            with self._switched_to(
                self.state.slot(slot).uid,
                self.state.slot(rows.prefix_adapter).uid if has_prefix else None,
                is_prefix if has_prefix else None,
            ):
                logits = self._logits(ids, mask, where)
            values = logits.float().log_softmax(-1)[place, token].double().cpu()
            sums[slot] = values.new_zeros(len(rows)).index_add_(0, row, values).tolist()
        return Scores(sums, tokens=len(slots) * ids.numel(), forwards=len(slots))

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, where: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Logits `[W, V]` behind the tokens at ``where``, W rows and W columns of ``ids``.

        lm_head gets the hidden states of these tokens only, from a hook: what a model does to its
        logits after it (a scale, a cap) is still the model's.
        """

        def pick(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (args[0][where],)

        head = self.model.get_output_embeddings()
        with ExitStack() as stack:
            # An adapted one tells prefixes from other tokens by their places in ``ids``.
            if isinstance(head, torch.nn.Linear):
                stack.enter_context(head.register_forward_pre_hook(pick))
            logits: torch.Tensor = self.model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).logits
        return logits if logits.dim() == 2 else logits[where]

    @contextmanager
    def _switched_to(
        self, active: str | None, prefix: str | None = None, is_prefix: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Let the adapted layers use the slot ``active``, and ``prefix`` for prefix tokens."""
        for layer in self._layers.values():
            layer.active, layer.prefix, layer.is_prefix = active, prefix, is_prefix
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.active, layer.prefix, layer.is_prefix = None, None, None


def _chunks(sequences: list[TokenSequence], limit: int | None) -> Iterator[list[TokenSequence]]:
    """Cut sequences into runs of at most ``limit`` tokens with padding, or of one sequence."""
    chunk: list[TokenSequence] = []
    for sequence in sequences:
        longest = max(len(s.tokens) for s in [*chunk, sequence])
        if chunk and limit is not None and longest * (len(chunk) + 1) > limit:
            yield chunk
            chunk = []
        chunk.append(sequence)
    yield chunk


class TransformersEngine:
    """See `mezo.engines.base.Engine`."""

    def why_not(self) -> str | None:
        """Return why transformers cannot be used here, in one sentence, or None."""
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed; run `pip install transformers`."
        return None

    @contextmanager
    def launch(
        self,
        model: str,
        config: MeZOConfig,
        *,
        threads: int | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        max_tokens_per_forward: int | None = None,
        cache_tokens: int = 0,
        arguments: Mapping[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Load a model onto the GPU in bf16, or without one into memory in fp32.

        ``threads`` are torch's, in this process, until the engine ends. There is no cache across
        batches. ``arguments`` are those of ``from_pretrained``.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = dtype or ("bfloat16" if device == "cuda" else "float32")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=chosen,
                revision=revision,
                trust_remote_code=trust_remote_code,
                **(arguments or {}),
            )
        except TypeError as error:
            if not arguments:
                raise
            words = f"train: engine_args must be arguments of from_pretrained, got {error}"
            raise ValueError(f"{words}; leave it out.") from error
        except (OSError, ValueError) as error:
            words = one_line(error)
            is_own_code = "trust_remote_code" in words
            raise EngineError(
                f"launch: model must be one that transformers can load, got {model!r} "
                f"({words[:300]}); "
                + ("pass trust_remote_code if you trust it." if is_own_code else "check the name.")
            ) from error
        if max_tokens_per_forward is not None:
            _max_tokens[loaded] = max_tokens_per_forward
        before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield loaded.to(device)
        finally:
            torch.set_num_threads(before)

    def open(self, handle: Any, config: MeZOConfig, tokenizer: Any) -> TransformersSession | None:
        """Attach an adapter to a Hugging Face causal language model."""
        if not isinstance(handle, torch.nn.Module):
            return None
        if "sglang" in sys.modules:  # an engine of it may have set the root logger's level
            show_warnings()
        return TransformersSession(handle, config, tokenizer)


ENGINE = TransformersEngine()
