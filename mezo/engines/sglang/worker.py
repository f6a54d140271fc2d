"""Our code in every scheduler process: holds the adapters being trained and answers messages.

Messages come over SGLang's RPC channel and are handled on the scheduler's main thread between
batches, in the same order in every tensor-parallel rank. A message has an id, names an operation
and carries JSON; the reply is JSON too, {"id", "reply"} or {"id", "error": [kind, sentence]}.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mezo._host import fp32_products
from mezo.config import MezoConfig
from mezo.core.state import AdapterState
from mezo.core.step import Scores, StepRequest, pair_slots, run_step
from mezo.data.batch import BASE, THETA, Rows
from mezo.diagnostics.selftest import GROUP, Check
from mezo.engines.sglang import selftest, serve_alora
from mezo.engines.sglang.batch import attention, logprobs, prefix
from mezo.engines.sglang.batch.score import check_budget, is_busy, score_rows
from mezo.engines.sglang.compat import Rank
from mezo.engines.sglang.lora_slots import Part, check_peft_names, parts_of
from mezo.engines.sglang.profile import Stopwatch, watched

if TYPE_CHECKING:
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.io_struct import RpcReqInput, RpcReqOutput
    from sglang.srt.managers.scheduler import Scheduler

METHOD = "mezo"
# Part of every reply to "hello"; the caller refuses a plugin that speaks another one.
PROTOCOL = 2

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

    scheduler: Scheduler
    config: MezoConfig
    state: AdapterState
    uids: dict[str, str]
    places: dict[str, int]  # of each slot: its number in the pool
    is_served: bool  # whether requests may name it

    def check_loaded(self) -> None:
        """Raise when somebody has unloaded the adapter: its slots may be another's by now."""
        manager = Rank(self.scheduler).lora_manager
        pool = manager.memory_pool.uid_to_buffer_id
        gone = [
            slot
            for slot, uid in self.uids.items()
            if pool.get(uid) != self.places[slot] or uid not in manager.lora_refs
        ]
        if gone:
            raise RuntimeError(
                f"run {self.config.name!r} must be loaded in SGLang, got its slots {gone} unloaded "
                "by somebody else; its weights are still there: save the run, close it and attach "
                "again."
            )

    def score(self, rows: Rows, slots: Sequence[str]) -> Scores:
        uids = {slot: None if slot == BASE else self.uids[slot] for slot in slots}
        return score_rows(Rank(self.scheduler), rows, uids, theta=self.uids[THETA])


def handle(scheduler: Scheduler, request: RpcReqInput) -> RpcReqOutput:
    """Answer one message (`Scheduler.handle_rpc_request`)."""
    from sglang.srt.managers.io_struct import RpcReqOutput

    parameters = request.parameters or {}
    envelope = {"id": parameters.get("id")}
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
        kind, _, sentence = str(error).partition(": ")
        message = json.dumps({**envelope, "error": [kind, sentence]})
        return RpcReqOutput(success=False, message=message)
    return RpcReqOutput(success=True, message=json.dumps({**envelope, "reply": reply}))


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


def _hello(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Say what is here."""
    from importlib.metadata import version

    runner = Rank(scheduler).runner
    model_config = runner.model_config
    is_fp32_on_cpu = runner.device == "cpu" and runner.dtype == torch.float32
    return {
        "fp32_products": fp32_products() if is_fp32_on_cpu else None,
        "protocol": PROTOCOL,
        "pids": gathered(os.getpid(), scheduler.tp_group.cpu_group),
        "versions": {"sglang": version("sglang"), "torch": torch.__version__},
        "max_row_tokens": int(model_config.context_len),
        "vocab_size": int(model_config.vocab_size),
        "dtype": str(model_config.dtype).removeprefix("torch."),
    }


def _attach(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Load the run's slots, pinned, and bind the adapter's state to them."""
    config = MezoConfig(**payload["config"])
    manager = Rank(scheduler).lora_manager
    _check_pool(manager, config)
    check_budget(Rank(scheduler), config)
    logprobs.check_lm_head(Rank(scheduler))
    attention.check_named_kernel(Rank(scheduler))
    if config.prefix == "activated":
        prefix.check_cache(Rank(scheduler))
    parts = parts_of(manager, config.target_modules, config.rank)
    unnamed = check_peft_names(Rank(scheduler).runner.model_config, parts, config.rank)
    uids: dict[str, str] = payload["uids"]
    invocation: list[int] = payload["invocation"]
    try:
        for slot, uid in uids.items():
            _load_empty_adapter(manager, config, parts, slot, uid, invocation)
        Rank(scheduler).load_adapters(uids.values())
        places = {slot: manager.memory_pool.uid_to_buffer_id[uid] for slot, uid in uids.items()}
        state = _new_state(manager, config, parts, places)
        agree()  # a rank that failed makes the others undo theirs
    except BaseException:
        _unload(manager, uids.values())
        raise
    why_not = serve_alora.why_not_servable(Rank(scheduler)) if invocation else None
    _adapters[config.name] = _Adapter(
        scheduler, config, state, uids, places, is_served=why_not is None
    )
    return {
        "num_parameters": state.arena.numel(),
        "partners": {p.spec.name: p.spec.global_shape for p in parts if not p.is_target},
        "not_served": why_not,
        "unnamed": unnamed,
    }


def _new_state(
    manager: LoRAManager, config: MezoConfig, parts: Sequence[Part], places: dict[str, int]
) -> AdapterState:
    """The adapter's masters on this rank, bound to its slots."""
    targets = [part for part in parts if part.is_target]
    views = {
        slot: [part.view(manager.memory_pool, place) for part in targets]
        for slot, place in places.items()
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
    return state


def _check_pool(manager: LoRAManager, config: MezoConfig) -> None:
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
    manager: LoRAManager,
    config: MezoConfig,
    parts: Sequence[Part],
    slot: str,
    uid: str,
    invocation: Sequence[int],
) -> None:
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


def _adapter(payload: dict[str, Any], *, is_loaded: bool = True) -> _Adapter:
    """The adapter that a message is about; ``is_loaded`` asks for its slots, too."""
    name = payload["name"]
    if name not in _adapters:
        raise ValueError(
            f"run {name!r} must be attached, got {sorted(_adapters)} in the engine; attach again."
        )
    if is_loaded:
        _adapters[name].check_loaded()
    return _adapters[name]


def _step(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Take one step; every rank computes its update from rank 0's losses."""
    adapter = _adapter(payload)

    def score(rows: Rows, slots: Sequence[str]) -> Scores:
        scores: Scores = agree(adapter.score(rows, slots))
        return scores

    request = StepRequest.from_json(payload["request"])
    return dataclasses.asdict(run_step(adapter.state, score, request))


def _breakdown(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Take a step under a stopwatch; seconds of each part of it, on rank 0."""
    watch = Stopwatch(Rank(scheduler).device)
    with watched(Rank(scheduler), watch), watch.part("engine"):
        reply = _step(scheduler, payload, agree)
    seconds = dict(watch.seconds)
    seconds["engine"] -= reply["weights_s"]
    return {**seconds, "weights": reply["weights_s"]}


def _score(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Score rows under theta or the base model."""
    adapter, slot = _adapter(payload), payload["slot"]
    if slot == THETA:
        adapter.state.publish()
    return dataclasses.asdict(adapter.score(Rows(**payload["rows"]), [slot]))


def _selftest(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Check the engine with the run's own slots; see `mezo.engines.sglang.selftest`."""
    adapter = _adapter(payload)

    def score(rows: Rows, slots: Sequence[str]) -> Scores:
        scores: Scores = agree(adapter.score(rows, slots))
        return scores

    rows, invocation = Rows(**payload["rows"]), payload["invocation"]
    if is_busy(Rank(scheduler), rows, 2 + min(2 * adapter.state.num_directions, GROUP)):
        reason = "the engine has no room for its rows now, as other requests run"
        return {"checks": [dataclasses.asdict(Check("engine", True, reason, is_skipped=True))]}
    found = selftest.checks(Rank(scheduler), adapter, rows, invocation, score)
    return {"checks": selftest.merged(gathered(found, scheduler.tp_group.cpu_group))}


def _apply_update(
    scheduler: Scheduler, payload: dict[str, Any], agree: Agreement
) -> dict[str, Any]:
    """Take a step whose coefficients are known."""
    _adapter(payload).state.take_step(payload["step"], payload["coefficients"])
    return {}


def _progress(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Say how many steps were taken, and what was replied to the last one."""
    state = _adapter(payload, is_loaded=False).state
    last = state.last_reply
    return {"steps": state.steps, "last": None if last is None else dataclasses.asdict(last)}


def _export(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Gather the fp32 masters of all ranks; rank 0 writes them to a file and says what they are."""
    from safetensors.torch import save_file

    group = scheduler.tp_group.cpu_group
    everyone = gathered(_adapter(payload, is_loaded=False).state.pack(), group)
    if dist.get_rank(group) == 0:
        save_file({str(rank): arena for rank, (_, arena) in enumerate(everyone)}, payload["path"])
    return {
        "places": [
            [(s.name, s.shape, s.row0, s.col0, s.global_shape) for s in specs]
            for specs, _ in everyone
        ]
    }


def _detach(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Take the run's slots out of the pool; what is not there any more is passed over."""
    adapter = _adapters.get(payload["name"])
    if adapter is not None and adapter.uids == payload["uids"]:
        _unload(Rank(scheduler).lora_manager, adapter.uids.values())
        del _adapters[payload["name"]]
    return {}


def _unload(manager: LoRAManager, uids: Iterable[str]) -> None:
    """Take adapters out of SGLang, with what a failed load has left of one."""
    for uid in uids:
        if uid in manager.lora_refs:
            manager.unload_lora_adapter(manager.lora_refs[uid])
        manager.configs.pop(uid, None)
        manager.loras.pop(uid, None)


def _memory(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Free KV tokens and request slots, and adapters SGLang knows, for leak checks."""
    adapters = len(Rank(scheduler).lora_manager.configs)
    return {**Rank(scheduler).free_memory(), "adapters": adapters}


def _fingerprint(scheduler: Scheduler, payload: dict[str, Any], agree: Agreement) -> dict[str, Any]:
    """Digest the base weights and every slot of the pool on rank 0, to tell what changed."""
    rank = Rank(scheduler)
    names = rank.lora_names
    slots = {
        str(names.get(uid, uid)): _digest(rank.slot_tensors(slot))
        for uid, slot in rank.lora_pool.uid_to_buffer_id.items()
    }
    return {"base": _digest(rank.model.parameters()), "slots": slots}


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
    "selftest": _selftest,
    "apply_update": _apply_update,
    "progress": _progress,
    "export": _export,
    "detach": _detach,
    "memory": _memory,
    "fingerprint": _fingerprint,
}
