"""The caller's side of SGLang: sends messages to our worker and gets scalars back."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mezo._host import warn_of_products
from mezo.checkpoint.peft import assemble
from mezo.config import MezoConfig
from mezo.core.state import AdapterState
from mezo.core.step import Scores, StepReply, StepRequest, pair_slots
from mezo.data.batch import THETA, Rows
from mezo.data.encode import encode_invocation
from mezo.diagnostics.selftest import Check
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

    def __init__(self, engine: Any, config: MezoConfig, tokenizer: Any = None) -> None:
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
        warn_of_products(hello.get("fp32_products"), "SGLang's scheduler processes")
        self.versions: dict[str, str] = hello["versions"]
        self.max_row_tokens = int(hello["max_row_tokens"])
        self.vocab_size = int(hello["vocab_size"])
        self.dtype: torch.dtype = getattr(torch, hello["dtype"])
        slots = [THETA, *pair_slots(config.num_directions)]
        self._uids = {slot: uuid.uuid4().hex for slot in slots}
        # The tokenizer is here, not in the worker.
        invocation = encode_invocation(config.invocation, self.tokenizer, prefix=config.prefix)
        self._invocation_tokens = invocation.tokens if config.prefix == "activated" else ()
        self._attach(config)

    def _attach(self, config: MezoConfig) -> None:
        """Put the adapter into the engine and let requests name it: both, or nothing."""
        try:
            self.info = self.call(
                "attach",
                config=dataclasses.asdict(config),
                uids=self._uids,
                invocation=self._invocation_tokens,
            )
            self.partners: dict[str, tuple[int, ...]] = {
                name: tuple(shape) for name, shape in self.info["partners"].items()
            }
            not_served, unnamed = self.info["not_served"], self.info["unnamed"]
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
        payload = dataclasses.asdict(request)
        return StepReply(**self.call("step", name=self._name, request=payload))

    def score(self, rows: Rows, slot: str) -> Scores:
        """See `Session.score`."""
        fields = dataclasses.asdict(rows)
        return Scores(**self.call("score", name=self._name, rows=fields, slot=slot))

    def apply_update(self, step: int, coefficients: Sequence[float]) -> None:
        """See `Session.apply_update`."""
        self.call("apply_update", name=self._name, step=step, coefficients=list(coefficients))

    def progress(self) -> tuple[int, StepReply | None]:
        """See `Session.progress`."""
        reply = self.call("progress", name=self._name)
        last = reply["last"]
        return int(reply["steps"]), None if last is None else StepReply(**last)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Session.weights`; raises RuntimeError when ranks disagree on a part both hold."""
        return assemble(shard for rank in self.shards() for shard in rank)

    def selftest(self, rows: Rows) -> list[Check]:
        """See `Session.selftest`."""
        fields = dataclasses.asdict(rows)
        reply = self.call(
            "selftest", name=self._name, rows=fields, invocation=self._invocation_tokens
        )
        return [Check(**check) for check in reply["checks"]]

    def shards(self) -> list[list[tuple[TensorSpec, torch.Tensor]]]:
        """Return each rank's part of the current fp32 adapter: (place, values)."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shards.safetensors"
            reply = self.call("export", name=self._name, path=str(path))
            arenas = {key: value.clone() for key, value in load_file(path).items()}
        ranks = []
        for rank, places in enumerate(reply["places"]):
            specs = [
                TensorSpec(name, tuple(shape), row0, col0, tuple(global_shape))
                for name, shape, row0, col0, global_shape in places
            ]
            ranks.append(AdapterState.unpack(specs, arenas[str(rank)]))
        return ranks

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
        self.call("detach", name=self._name, uids=self._uids)
        self._conversation.closed(self._uids[THETA])

    def free_memory(self) -> dict[str, int]:
        """Free KV tokens and request slots in the engine."""
        return {key: int(value) for key, value in self.call("memory").items()}
