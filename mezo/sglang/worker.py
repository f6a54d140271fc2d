"""Our code in every scheduler process: holds the adapters being trained and answers messages.

Messages come over SGLang's RPC channel and are handled on the scheduler's main thread between
batches, in the same order in every tensor-parallel rank. A message names an operation and carries
JSON; the reply is JSON too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mezo.config import MezoConfig
from mezo.core import Scores, StepRequest, pair_slots, run_step
from mezo.data import BASE, THETA, Rows
from mezo.sglang import activated, attention, compat, prefix, readout, scoring
from mezo.sglang.breakdown import Stopwatch, watched
from mezo.sglang.slots import Part, parts_of
from mezo.state import AdapterState

METHOD = "mezo"
# Part of every reply to "hello"; the caller refuses a plugin that speaks another one.
PROTOCOL = 1

logger = logging.getLogger(__name__)
_adapters: dict[str, _Adapter] = {}


def gathered(value: Any, group: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    everyone = [value] * dist.get_world_size(group)
    if len(everyone) > 1:  # alone, a rank would pickle its value for itself
        dist.all_gather_object(everyone, value, group=group)
    return everyone


class Agreement:
    """Makes the ranks of one message agree: all succeed, or all raise; rank 0's value counts."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.is_done = False

    def __call__(self, value: Any = None, error: str | None = None) -> Any:
        """Exchange values and errors once; returns rank 0's value or raises the first error."""
        self.is_done = True
        everyone = gathered((value, error), self._group)
        errors = [e for _, e in everyone if e is not None]
        if errors:
            raise RankError(errors[0])
        return everyone[0][0]


class RankError(RuntimeError):
    """An operation failed in some rank."""


@dataclasses.dataclass
class _Adapter:
    """An adapter being trained, on this rank."""

    scheduler: Any
    config: MezoConfig
    state: AdapterState
    uids: dict[str, str]
    is_served: bool  # whether requests may name it

    def score(self, rows: Rows, slots: Sequence[str]) -> Scores:
        uids = {slot: None if slot == BASE else self.uids[slot] for slot in slots}
        return scoring.score_rows(self.scheduler, rows, uids, theta=self.uids[THETA])


def handle(scheduler: Any, request: Any) -> Any:
    """Answer one message (`Scheduler.handle_rpc_request`)."""
    from sglang.srt.managers.io_struct import RpcReqOutput

    parameters = request.parameters or {}
    agree = Agreement(scheduler.tp_group.cpu_group)
    try:
        try:
            operation = _OPERATIONS[parameters["op"]]
            reply = operation(scheduler, json.loads(parameters["payload"]), agree)
        except RankError:
            raise
        except Exception as error:
            if not isinstance(error, (ValueError, NotImplementedError)):
                logger.exception("mezo: operation %s failed", parameters.get("op"))
            agree(error=f"{type(error).__name__}: {error}")
        if not agree.is_done:
            agree()
    except RankError as error:
        return RpcReqOutput(success=False, message=str(error))
    return RpcReqOutput(success=True, message=json.dumps(reply))


def served_version(lora_id: str | None) -> int | None:
    """The version of the weights that a request for ``lora_id`` gets, if it is one we train."""
    for adapter in _adapters.values():
        if lora_id is not None and lora_id == adapter.uids[THETA]:
            return adapter.state.version
    return None


def publish_served(lora_ids: Sequence[str | None]) -> None:
    """Bring the theta slots that a batch is about to read up to date."""
    for adapter in _adapters.values():
        if adapter.uids[THETA] in lora_ids:
            adapter.state.publish()


def _hello(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Say what is here."""
    from importlib.metadata import version

    model_config = compat.model_runner(scheduler).model_config
    return {
        "protocol": PROTOCOL,
        "versions": {"sglang": version("sglang"), "torch": torch.__version__},
        "max_row_tokens": int(model_config.context_len),
        "vocab_size": int(model_config.vocab_size),
    }


def _attach(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Load the run's slots, pinned, and bind the adapter's state to them."""
    config = MezoConfig(**payload["config"])
    manager = compat.model_runner(scheduler).lora_manager
    _check_pool(manager, config)
    readout.check_lm_head(scheduler)
    attention.check_named_form(scheduler)
    if config.prefix == "activated":
        prefix.check_cache(scheduler)
    parts = parts_of(manager, config.target_modules, config.rank)
    uids: dict[str, str] = payload["uids"]
    invocation: list[int] = payload["invocation"]
    loaded: list[Any] = []
    try:
        for slot, uid in uids.items():
            loaded.append(_load_empty_adapter(manager, config, parts, slot, uid, invocation))
        compat.fetch_adapters(manager, set(uids.values()))
    except Exception:
        for ref in loaded:
            manager.unload_lora_adapter(ref)
        raise
    pool = manager.memory_pool
    targets = [part for part in parts if part.is_target]
    views = {
        slot: [part.view(pool, pool.uid_to_buffer_id[uid]) for part in targets]
        for slot, uid in uids.items()
    }
    state = AdapterState(
        [part.spec for part in targets],
        seed=config.seed,
        distribution=config.distribution,
        pairs=[(views[f"plus{k}"], views[f"minus{k}"]) for k in range(config.num_directions)],
        theta=views[THETA],
        device=views[THETA][0].device,
    )
    state.publish()
    why_not = activated.why_not_servable(scheduler) if invocation else None
    _adapters[config.name] = _Adapter(scheduler, config, state, uids, is_served=why_not is None)
    partners = {p.spec.name: p.spec.global_shape for p in parts if not p.is_target}
    return {"num_parameters": state.arena.numel(), "not_served": why_not, "partners": partners}


def _check_pool(manager: Any, config: MezoConfig) -> None:
    """Raise unless the pool can take the run's slots."""
    pool = manager.memory_pool
    if config.name in _adapters or any(
        ref.lora_name == config.name for ref in manager.lora_refs.values()
    ):
        raise ValueError(
            f"attach: name must be new in the engine, got {config.name!r}, which is loaded; "
            "close that run or choose another MezoConfig.name."
        )
    if config.rank > pool.max_lora_rank:
        raise ValueError(
            f"attach: rank must be at most the engine's max_lora_rank {pool.max_lora_rank}, "
            f"got {config.rank}; start the engine with max_lora_rank={config.rank}."
        )
    slots = len(pair_slots(config.num_directions)) + 1
    # SGLang keeps one slot unpinned for the base model and other adapters.
    free = pool.max_loras_per_batch - 1 - manager.num_pinned_loras
    if slots > free:
        raise ValueError(
            f"attach: the LoRA pool must have {slots} slots to pin for {config.num_directions} "
            f"direction(s), got {max(free, 0)} (max_loras_per_batch is {pool.max_loras_per_batch}, "
            f"{manager.num_pinned_loras} pinned, 1 kept for the base model); start the engine with "
            f"max_loras_per_batch={slots + 1 + manager.num_pinned_loras}."
        )


def _load_empty_adapter(
    manager: Any,
    config: MezoConfig,
    parts: Sequence[Part],
    slot: str,
    uid: str,
    invocation: Sequence[int],
) -> Any:
    """Register an all-zero adapter of the run's shape under ``uid``, pinned.

    With ``invocation`` requests for theta's slot are served as an activated adapter's.
    """
    from sglang.srt.lora.lora_registry import LoRARef

    name = config.name if slot == THETA else f"{config.name}/{slot}"
    ref = LoRARef(lora_id=uid, lora_name=name, lora_path=f"mezo:{name}", pinned=True)
    tensors = {
        f"base_model.model.{part.spec.name}.weight": torch.zeros(part.spec.global_shape)  # type: ignore[arg-type]
        for part in parts
    }
    modules = sorted({part.spec.name.split(".")[-2] for part in parts})
    result = manager.load_lora_adapter_from_tensors(
        ref,
        tensors,
        {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "target_modules": modules,
            "alora_invocation_tokens": list(invocation) if slot == THETA else None,
        },
    )
    if not result.success:
        raise ValueError(
            f"attach: SGLang must accept the adapter's shape, got: {result.error_message}; "
            "start the engine with a pool that fits the MezoConfig."
        )
    return ref


def _adapter(payload: dict[str, Any]) -> _Adapter:
    """The adapter that a message is about."""
    name = payload["name"]
    if name not in _adapters:
        raise ValueError(
            f"run {name!r} must be attached, got {sorted(_adapters)} in the engine; attach again."
        )
    return _adapters[name]


def _step(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Take one step; every rank computes its update from rank 0's losses."""
    adapter = _adapter(payload)

    def score(rows: Rows, slots: Sequence[str]) -> Scores:
        scores: Scores = agree(adapter.score(rows, slots))
        return scores

    request = StepRequest.from_json(payload["request"])
    return dataclasses.asdict(run_step(adapter.state, score, request))


def _breakdown(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Take a step under a stopwatch; seconds of each part of it, on rank 0."""
    watch = Stopwatch(compat.model_runner(scheduler).device)
    with watched(scheduler, watch), watch.part("engine"):
        reply = _step(scheduler, payload, agree)
    seconds = dict(watch.seconds)
    seconds["engine"] -= reply["weights_s"]
    return {**seconds, "weights": reply["weights_s"]}


def _score(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Score rows under theta or the base model."""
    adapter, slot = _adapter(payload), payload["slot"]
    if slot == THETA:
        adapter.state.publish()
    return dataclasses.asdict(adapter.score(Rows(**payload["rows"]), [slot]))


def _apply_update(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Take an update whose coefficients are known."""
    _adapter(payload).state.defer_update(payload["step"], payload["coefficients"])
    return {}


def _export(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Gather the fp32 masters of all ranks; rank 0 writes them to a file and says what they are."""
    from safetensors.torch import save_file

    group = scheduler.tp_group.cpu_group
    everyone = gathered(_adapter(payload).state.pack(), group)
    if dist.get_rank(group) == 0:
        save_file({str(rank): arena for rank, (_, arena) in enumerate(everyone)}, payload["path"])
    return {
        "places": [
            [(s.name, s.shape, s.row0, s.col0, s.global_shape) for s in specs]
            for specs, _ in everyone
        ]
    }


def _detach(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Take the run's slots out of the pool; one that is served goes through SGLang's unloading."""
    adapter = _adapters.pop(payload["name"], None)
    if adapter is not None:
        manager = compat.model_runner(scheduler).lora_manager
        for slot, uid in adapter.uids.items():
            if slot != THETA or not adapter.is_served:
                manager.unload_lora_adapter(manager.lora_refs[uid])
    return {}


def _memory(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Free KV tokens and request slots, and adapters SGLang knows, for leak checks."""
    adapters = len(compat.model_runner(scheduler).lora_manager.configs)
    return {**compat.free_memory(scheduler), "adapters": adapters}


def _fingerprint(scheduler: Any, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Digest the base weights and every slot of the pool on rank 0, to tell what changed."""
    manager = compat.model_runner(scheduler).lora_manager
    pool = manager.memory_pool
    buffers = [t for b in (pool.A_buffer, pool.B_buffer) for name in sorted(b) for t in b[name]]
    names = {uid: ref.lora_name for uid, ref in manager.lora_refs.items()}
    slots = {
        str(names.get(uid, uid)): _digest(tensor[slot] for tensor in buffers)
        for uid, slot in pool.uid_to_buffer_id.items()
    }
    parameters = compat.model_runner(scheduler).model.parameters()
    return {"base": _digest(parameters), "slots": slots}


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """blake2s of the tensors' bytes."""
    digest = hashlib.blake2s()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_OPERATIONS: dict[str, Callable[[Any, dict[str, Any], Agreement], dict[str, Any]]] = {
    "hello": _hello,
    "attach": _attach,
    "step": _step,
    "breakdown": _breakdown,
    "score": _score,
    "apply_update": _apply_update,
    "export": _export,
    "detach": _detach,
    "memory": _memory,
    "fingerprint": _fingerprint,
}
