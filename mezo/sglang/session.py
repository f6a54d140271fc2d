"""The caller's side of SGLang: sends messages to our worker and gets scalars back."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mezo.adapter import assemble
from mezo.config import MezoConfig
from mezo.core import Scores, StepReply, StepRequest, pair_slots
from mezo.data import THETA, Rows, encode_invocation
from mezo.sglang import compat
from mezo.sglang.launch import slots_needed
from mezo.sglang.worker import METHOD, PROTOCOL
from mezo.state import AdapterState
from mezo_kernels import TensorSpec

logger = logging.getLogger(__name__)
_POLL_MS = 1000
_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "NotImplementedError": NotImplementedError,
}


class SglangSession:
    """An adapter in a running `sglang.Engine`.

    Args:
        engine: the engine, with LoRA enabled.
        config: the run's configuration.

    Raises:
        ValueError: the engine's LoRA pool does not fit the run.
        NotImplementedError: a parallelism or decoding mode that MeZO does not support.
        RuntimeError: our plugin is not loaded in the scheduler processes.
    """

    engine_name = "sglang"

    def __init__(self, engine: Any, config: MezoConfig) -> None:
        _check_server(engine.server_args, config)
        self.engine = engine
        self.tokenizer = engine.tokenizer_manager.tokenizer
        self.model_path = str(engine.server_args.model_path)
        self._name = config.name
        self._processes = multiprocessing.active_children()
        hello = self._hello()
        self.versions: dict[str, str] = hello["versions"]
        self.max_row_tokens = int(hello["max_row_tokens"])
        self.vocab_size = int(hello["vocab_size"])
        slots = [THETA, *pair_slots(config.num_directions)]
        uids = {slot: uuid.uuid4().hex for slot in slots}
        # The tokenizer is here, not in the worker.
        invocation = encode_invocation(config.invocation, self.tokenizer, prefix=config.prefix)
        self.info = self.call(
            "attach",
            config=dataclasses.asdict(config),
            uids=uids,
            invocation=invocation.tokens if config.prefix == "activated" else (),
        )
        self.partners: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in self.info["partners"].items()
        }
        self._is_served = self.info["not_served"] is None
        if self._is_served:
            self._register(uids[THETA])
        else:
            logger.warning("requests cannot name run %r: %s", config.name, self.info["not_served"])

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

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Session.weights`; raises RuntimeError when ranks disagree on a part both hold."""
        return assemble(shard for rank in self.shards() for shard in rank)

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
        """See `Session.close`; does nothing when the engine is gone already."""
        # SGLang's own calls would wait for a dead scheduler without end.
        if self.engine.send_to_rpc is None or self._dead():
            return
        self.call("detach", name=self._name)
        if self._is_served:
            self.engine.unload_lora_adapter(self._name)

    def free_memory(self) -> dict[str, int]:
        """Free KV tokens and request slots in the engine."""
        return {key: int(value) for key, value in self.call("memory").items()}

    def call(self, op: str, **payload: Any) -> dict[str, Any]:
        """Send one message to all scheduler processes and return rank 0's reply.

        Raises:
            ValueError, NotImplementedError: as the worker raised it.
            RuntimeError: any other failure in a worker, or a dead scheduler process.
        """
        reply = self._exchange(op, payload)
        if reply.success:
            result: dict[str, Any] = json.loads(reply.message)
            return result
        kind, _, sentence = reply.message.partition(": ")
        raise _ERRORS.get(kind, RuntimeError)(sentence if kind in _ERRORS else reply.message)

    def _exchange(self, op: str, payload: dict[str, Any]) -> Any:
        """Send and wait, looking after the scheduler processes meanwhile."""
        from sglang.srt.managers.io_struct import RpcReqInput

        socket = self.engine.send_to_rpc
        parameters = {"op": op, "payload": json.dumps(payload)}
        compat.send(socket, RpcReqInput(method=METHOD, parameters=parameters))
        while not socket.poll(_POLL_MS):
            if dead := self._dead():
                raise RuntimeError(
                    f"{op}: SGLang's processes must be alive, got {len(dead)} dead "
                    f"(exit code {dead[0].exitcode}); see the engine's log and start it again."
                )
        return compat.receive(socket)

    def _dead(self) -> list[Any]:
        """The engine's processes that have ended."""
        return [p for p in self._processes if not p.is_alive()]

    def _hello(self) -> dict[str, Any]:
        """Check that the plugin is there and speaks our protocol."""
        reply = self._exchange("hello", {})
        if not reply.success:
            raise RuntimeError(
                "attach: the mezo plugin must be loaded in SGLang's scheduler processes, got "
                f"{reply.message!r}; install mezo-sglang in the engine's environment, and let "
                "SGLANG_PLUGINS, if set, contain 'mezo'."
            )
        hello: dict[str, Any] = json.loads(reply.message)
        if hello["protocol"] != PROTOCOL:
            raise RuntimeError(
                f"attach: the engine's mezo plugin must speak protocol {PROTOCOL}, got "
                f"{hello['protocol']}; restart the engine with the installed mezo-sglang."
            )
        return hello

    def _register(self, uid: str) -> None:
        """Let requests name the adapter: `engine.generate(..., lora_path=run.name)`."""
        from sglang.srt.lora.lora_registry import LoRARef

        manager = self.engine.tokenizer_manager
        ref = LoRARef(
            lora_id=uid, lora_name=self._name, lora_path=f"mezo:{self._name}", pinned=True
        )
        self.engine.loop.run_until_complete(manager.lora_registry.register(ref))
        manager.lora_ref_cache[self._name] = ref


def _check_server(args: Any, config: MezoConfig) -> None:
    """Refuse an engine that cannot hold the run, before anything is sent to it."""
    if not args.enable_lora:
        raise ValueError(
            "attach: the engine must be started with enable_lora=True, got enable_lora=False; "
            "use mezo.launch_engine(model_path, config)."
        )
    needed = slots_needed(config)
    if args.max_loras_per_batch < needed:
        raise ValueError(
            f"attach: max_loras_per_batch must be at least {needed} (base, theta and a pair for "
            f"each of {config.num_directions} direction(s)), got {args.max_loras_per_batch}; "
            f"start the engine with max_loras_per_batch={needed}."
        )
    for name, supported in (("pp_size", 1), ("dp_size", 1), ("speculative_algorithm", None)):
        value = getattr(args, name, supported)
        if value != supported:
            raise NotImplementedError(
                f"attach: {name} must be {supported}, got {value!r}; "
                "scale with tensor parallelism (tp_size) instead."
            )
