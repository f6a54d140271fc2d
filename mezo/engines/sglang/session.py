"""The caller's side of SGLang: sends messages to our worker and gets scalars back."""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mezo._host import warn_of_products
from mezo.checkpoint.peft import assemble
from mezo.config import MeZOConfig
from mezo.core import messages
from mezo.core.messages import Check, ProgressReply, StepReply, StepRequest
from mezo.core.rows import BASE, THETA, Rows, Scores, run_slots
from mezo.core.state import AdapterState
from mezo.core.wire import to_json
from mezo.data.encode import encode_invocation
from mezo.engines.sglang import registry
from mezo.engines.sglang.conversation import Conversation
from mezo.engines.sglang.sizing import check_server
from mezo_kernels import TensorSpec

logger = logging.getLogger(__name__)


class SglangSession:
    """An adapter in a running `sglang.Engine`.

    Args:
        engine: the engine, with LoRA enabled.
        config: the run's configuration.
        tokenizer: for text, in place of the engine's own; or None.

    Raises:
        ValueError: the engine's LoRA pool does not fit the run.
        NotImplementedError: a parallelism or decoding mode that MeZO does not support.
        RuntimeError: our plugin is not loaded in the scheduler processes.
    """

    engine_name = "sglang"

    def __init__(self, engine: Any, config: MeZOConfig, tokenizer: Any = None) -> None:
        check_server("attach", engine.server_args, config)
        self.engine = engine
        # An engine started with skip_tokenizer_init has none.
        own = getattr(engine.tokenizer_manager, "tokenizer", None)
        self.tokenizer = own if tokenizer is None else tokenizer
        self.model_path = str(engine.server_args.model_path)
        self._name = config.name
        self._conversation = Conversation.of(engine)
        self.lock = self._conversation.lock
        self.call = self._conversation.call
        hello = self._conversation.hello()
        warn_of_products(hello.fp32_products, "SGLang's scheduler processes")
        self.versions = hello.versions
        self.max_row_tokens = hello.max_row_tokens
        self.vocab_size = hello.vocab_size
        self.dtype: torch.dtype = getattr(torch, hello.dtype)
        self._uids = {slot: uuid.uuid4().hex for slot in run_slots(config.num_directions)}
        # The tokenizer is here, not in the worker.
        self.invocation = encode_invocation(
            config.invocation, self.tokenizer, prefix_mode=config.prefix
        )
        self._attach(config)

    def _attach(self, config: MeZOConfig) -> None:
        """Put the adapter into the engine and let requests name it: both, or nothing."""
        try:
            tokens = self.invocation.activating_tokens
            self.info = self.call(messages.Attach(config, self._uids, invocation=tokens))
            self.partners = self.info.partners
            not_served, unnamed = self.info.not_served, self.info.unnamed
            if not_served is None:
                registry.register(self.engine, self._name, self._uids[THETA])
            self._conversation.opened(self._uids[THETA])
        except BaseException:
            # Also when the caller was interrupted while the worker went on.
            if not self._conversation.is_over():
                self._take_out()
            raise
        if not_served is not None:
            logger.warning("requests cannot name run %r: %s", self._name, not_served)
        if unnamed is not None:
            logger.warning("run %r: names not compared with PEFT's: %s", self._name, unnamed)

    def step(self, request: StepRequest) -> StepReply:
        """See `Session.step`."""
        return self.call(messages.Step(self._name, request))

    def score(self, rows: Rows, slot: str) -> Scores:
        """See `Session.score`."""
        return self.call(messages.Score(self._name, rows, slot))

    def apply_updates(self, step: int, coefficients: Sequence[Sequence[float]]) -> None:
        """See `Session.apply_updates`."""
        self.call(messages.ApplyUpdates(self._name, step, tuple(map(tuple, coefficients))))

    def progress(self) -> ProgressReply:
        """See `Session.progress`."""
        return self.call(messages.Progress(self._name))

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Session.weights`; raises RuntimeError when ranks disagree on a part both hold."""
        return assemble(shard for rank in self.shards() for shard in rank)

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Session.set_weights`."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "weights.safetensors"
            save_file({name: value.contiguous() for name, value in weights.items()}, path)
            self.call(messages.SetWeights(self._name, str(path)))

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
        """See `Session.generate`; the engine splits an activated adapter's prompts by itself.

        Raises:
            NotImplementedError: requests cannot name the run in this engine.
            RuntimeError: an event loop is running in this thread.
        """
        if registry.is_loop_running():
            raise RuntimeError(
                "generate: no event loop may be running in this thread, got one (a notebook, a web "
                "handler); await engine.async_generate(lora_path=run.name) there, or call this "
                "from another thread."
            )
        if slot != BASE and self.info.not_served is not None:
            raise NotImplementedError(f"generate: {self.info.not_served}")
        parameters = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stop": list(stop),
        }
        replies = self.engine.generate(
            input_ids=[list(prompt) for prompt in prompts],
            sampling_params=parameters,
            lora_path=[None if slot == BASE else self._name for _ in prompts],
        )
        return [list(reply["output_ids"]) for reply in replies]

    def selftest(self, rows: Rows) -> list[Check]:
        """See `Session.selftest`."""
        return list(self.call(messages.Selftest(self._name, rows)).checks)

    def shards(self) -> list[list[tuple[TensorSpec, torch.Tensor]]]:
        """Return each rank's part of the current fp32 adapter: (place, values)."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shards.safetensors"
            reply = self.call(messages.Export(self._name, str(path)))
            arenas = {key: value.clone() for key, value in load_file(path).items()}
        return [
            AdapterState.unpack(specs, arenas[str(rank)]) for rank, specs in enumerate(reply.places)
        ]

    def close(self) -> None:
        """See `Session.close`; does nothing when the engine is gone already.

        Raises:
            RuntimeError: requests for the run are running in the event loop of this thread.
                Nothing has changed then.
        """
        # SGLang's own calls would wait for a dead scheduler without end.
        if not self._conversation.is_over():
            self._take_out()

    def _take_out(self) -> None:
        """Take the name from requests, then the slots from the engine; again where that failed."""
        registry.forget(self.engine, self._name, self._uids[THETA])
        self.call(messages.Detach(self._name, self._uids))
        self._conversation.closed(self._uids[THETA])

    def cache_tokens(self) -> int:
        """Return how many tokens' keys and values the engine can hold."""
        memory = self.call(messages.Memory())
        return memory.kv_tokens + memory.evictable_tokens + memory.protected_tokens

    def free_memory(self) -> dict[str, int]:
        """Free KV tokens and request slots in the engine."""
        return to_json(self.call(messages.Memory()))
