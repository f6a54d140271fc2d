"""The adapters being trained in this process: their slots in SGLang's pool, and their state.

Each slot is an ordinary adapter of SGLang, all zeros, pinned, under an id of its own. The state
writes through views of the pool; batches name the ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from mezo.config import MeZOConfig
from mezo.core.messages import Attach
from mezo.core.rows import THETA, Rows, Scores, run_slots
from mezo.core.state import AdapterSlot, AdapterState
from mezo.engines.sglang.batch.score import score_rows
from mezo.engines.sglang.compat import Rank
from mezo.engines.sglang.lora_slots import Part
from mezo.engines.sglang.ranks import Agreement

if TYPE_CHECKING:
    from sglang.srt.lora.lora_manager import LoRAManager

_adapters: dict[str, TrainedAdapter] = {}


@dataclasses.dataclass
class TrainedAdapter:
    """An adapter being trained, on this rank.

    Args:
        rank: this rank.
        config: the run's configuration.
        state: the masters, bound to the slots.
        uids: {slot name: its id in SGLang}.
        adapter_slots: {slot name: its number in SGLang's pool}.
        invocation: tokens from which an activated adapter acts; none for an ordinary one.
        is_served: whether requests may name it.
    """

    rank: Rank
    config: MeZOConfig
    state: AdapterState
    uids: dict[str, str]
    adapter_slots: dict[str, int]
    invocation: tuple[int, ...]
    is_served: bool

    def check_loaded(self) -> None:
        """Raise when somebody has unloaded the adapter: its slots may be another's by now."""
        manager = self.rank.lora_manager
        pool = manager.memory_pool.uid_to_buffer_id
        gone = [
            slot
            for slot, uid in self.uids.items()
            if pool.get(uid) != self.adapter_slots[slot] or uid not in manager.lora_refs
        ]
        if gone:
            raise RuntimeError(
                f"run {self.config.name!r} must be loaded in SGLang, got its slots {gone} unloaded "
                "by somebody else; its weights are still there: save the run, close it and attach "
                "again."
            )

    def score(self, rows: Rows, slots: Sequence[str]) -> Scores:
        """Score rows under slots of this run."""
        prefix = self.state.slot(rows.prefix_adapter)
        uids = {slot: self.state.slot(slot).uid for slot in slots}
        return score_rows(self.rank, rows, uids, theta=prefix.uid)


def load(
    rank: Rank, request: Attach, parts: Sequence[Part], agree: Agreement, *, is_served: bool
) -> TrainedAdapter:
    """Load a run's slots, pinned, and bind its state to them: on every rank, or on none.

    `check_pool` comes first.

    Args:
        rank: this rank.
        request: what was asked for.
        parts: the adapter's tensors on this rank.
        agree: of the message.
        is_served: whether requests may name the run.

    Raises:
        ValueError: SGLang refuses the adapter.
    """
    manager = rank.lora_manager
    config, uids = request.config, request.uids
    try:
        for slot, uid in uids.items():
            _load_empty_adapter(manager, config, parts, slot, uid, request.invocation)
        rank.load_adapters(uids.values())
        adapter_slots = {
            slot: manager.memory_pool.uid_to_buffer_id[uid] for slot, uid in uids.items()
        }
        state = _new_state(manager, config, parts, uids, adapter_slots)
        agree()  # a rank that failed makes the others undo theirs
    except BaseException:
        _unload(manager, uids.values())
        raise
    adapter = TrainedAdapter(
        rank, config, state, uids, adapter_slots, request.invocation, is_served=is_served
    )
    _adapters[config.name] = adapter
    return adapter


def unload(rank: Rank, run: str, uids: dict[str, str]) -> None:
    """Unload a run's slots; what is not there any more is ignored."""
    adapter = _adapters.get(run)
    if adapter is not None and adapter.uids == uids:
        _unload(rank.lora_manager, uids.values())
        del _adapters[run]


def get(run: str, *, is_loaded: bool = True) -> TrainedAdapter:
    """Return the adapter of a run.

    Args:
        run: the run's name.
        is_loaded: whether its slots must be loaded, too.

    Raises:
        ValueError: no run of this name is attached.
        RuntimeError: somebody has unloaded a slot.
    """
    if run not in _adapters:
        raise ValueError(
            f"run {run!r} must be attached, got {sorted(_adapters)} in the engine; attach again."
        )
    if is_loaded:
        _adapters[run].check_loaded()
    return _adapters[run]


def served_version(lora_id: str | None) -> int | None:
    """The version of the weights that a request for ``lora_id`` gets, if it is one we train."""
    for adapter in _adapters.values():
        if lora_id is not None and lora_id == adapter.uids[THETA]:
            return adapter.state.version
    return None


def sync(lora_ids: Iterable[str | None]) -> None:
    """Bring the slots that a batch is about to read up to date."""
    uids = set(lora_ids)
    for adapter in _adapters.values():
        adapter.state.sync(uids)


def check_pool(manager: LoRAManager, config: MeZOConfig) -> None:
    """Raise unless the pool has room for the run's slots.

    Raises:
        ValueError: the run's name is known, its rank is too large, or there are too few slots.
    """
    pool = manager.memory_pool
    if config.name in _adapters or any(
        ref.lora_name == config.name for ref in manager.lora_refs.values()
    ):
        raise ValueError(
            f"attach: name must be new in the engine, got {config.name!r}, which is loaded; "
            "close that run or choose another MeZOConfig.name."
        )
    if config.rank > pool.max_lora_rank:
        raise ValueError(
            f"attach: rank must be at most the engine's max_lora_rank {pool.max_lora_rank}, "
            f"got {config.rank}; start the engine with max_lora_rank={config.rank}."
        )
    slots = len(run_slots(config.num_directions))
    # SGLang keeps one slot unpinned for the base model and other adapters.
    free = pool.max_loras_per_batch - 1 - manager.num_pinned_loras
    if slots > free:
        raise ValueError(
            f"attach: the LoRA pool must have {slots} slots to pin for {config.num_directions} "
            f"direction(s), got {max(free, 0)} (max_loras_per_batch is {pool.max_loras_per_batch}, "
            f"{manager.num_pinned_loras} pinned, 1 kept for the base model); start the engine with "
            f"max_loras_per_batch={slots + 1 + manager.num_pinned_loras}."
        )


def _new_state(
    manager: LoRAManager,
    config: MeZOConfig,
    parts: Sequence[Part],
    uids: dict[str, str],
    adapter_slots: dict[str, int],
) -> AdapterState:
    """The adapter's masters on this rank, bound to its slots."""
    targets = [part for part in parts if part.is_target]
    slots = [
        AdapterSlot(name, uids[name], [part.view(manager.memory_pool, index) for part in targets])
        for name, index in adapter_slots.items()
    ]
    return AdapterState(
        [part.spec for part in targets],
        seed=config.seed,
        distribution=config.distribution,
        slots=slots,
        device=slots[0].tensors[0].device,
    )


def _load_empty_adapter(
    manager: LoRAManager,
    config: MeZOConfig,
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
            "start the engine with a pool that fits the MeZOConfig."
        )


def _unload(manager: LoRAManager, uids: Iterable[str]) -> None:
    """Take adapters out of SGLang, with what a failed load has left of one."""
    for uid in uids:
        if uid in manager.lora_refs:
            manager.unload_lora_adapter(manager.lora_refs[uid])
        manager.configs.pop(uid, None)
        manager.loras.pop(uid, None)
