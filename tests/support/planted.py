"""Faults that tests plant into the scheduler process of a running engine, by a message.

`install` makes this module a plugin of SGLang for the engines that are started next.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from mezo.core import messages

_undo = []
_captured = []


def install(directory: Path) -> None:
    """Write a plugin's metadata; spawned processes that have the directory on sys.path load it."""
    info = directory / "planted-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nplanted = {__name__}:register\n")


def start(start_engine, folders, *arguments, **named):
    """Start a module's engine with the plugin; ``folders`` is pytest's tmp_path_factory."""
    import pytest  # not in SGLang's processes

    directory = folders.mktemp("plugin")
    install(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(directory), *sys.path])  # a spawned process takes it over
        return start_engine(*arguments, **named)


def register() -> None:
    """Called by SGLang in each of its processes, too early to import what needs SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.__init__", _add_operation, HookType.AFTER
    )


def _add_operation(result, *args, **kwargs):
    from mezo.engines.sglang import worker

    worker._HANDLERS[Plant] = plant


@dataclasses.dataclass(frozen=True)
class Plant(messages.Request[messages.Done]):
    operation = "plant"
    reply = messages.Done
    fault: str | None


messages.REQUESTS[Plant.operation] = Plant


def plant(rank, request, agree):
    """Undo the fault from before and plant another, or none."""
    while _undo:
        _undo.pop()()
    if request.fault:
        globals()[request.fault](rank.scheduler)
    return messages.Done()


def _replace(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))
    return before


def views_of_other_slots(scheduler):
    from mezo.engines.sglang.lora_slots import Part

    def other(part, pool, slot):
        return before(part, pool, (slot + 1) % pool.max_loras_per_batch)

    before = _replace(Part, "view", other)


def signs_swapped(scheduler):
    from mezo.engines.sglang import trained

    def swapped(*args, slots, **others):
        return before(*args, slots=with_signs_swapped(slots), **others)

    before = _replace(trained, "AdapterState", swapped)


def with_signs_swapped(slots):
    """The slots, each perturbed one with the tensors of the other sign."""
    from mezo.core.rows import minus_slot, plus_slot

    tensors = {slot.name: slot.tensors for slot in slots}
    for k in range((len(slots) - 1) // 2):
        plus, minus = plus_slot(k), minus_slot(k)
        tensors[plus], tensors[minus] = tensors[minus], tensors[plus]
    return [dataclasses.replace(slot, tensors=tensors[slot.name]) for slot in slots]


def adapter_not_applied(scheduler):
    for modules in scheduler.tp_worker.model_runner.lora_manager.lora_modules:
        for module in modules.values():
            _replace(module, "set_lora", False)


def theta_never_written(scheduler):
    from mezo.core.state import AdapterState

    _replace(AdapterState, "_sync_theta", lambda state: None)


def signs_scored_apart(scheduler):
    def change(slot, value, call):
        return value * (1 + 2**-22) if slot.startswith("minus") else value

    _change_scores(change)


def base_moves(scheduler):
    _change_scores(lambda slot, value, call: value - 0.01 * call * (slot == "base"))


def _change_scores(change):
    from mezo.engines.sglang import trained

    calls = []

    def score(adapter, rows, slots):
        calls.append(None)
        scores = before(adapter, rows, slots)
        sums = scores.logprob_sums
        for slot, values in sums.items():
            sums[slot] = [change(slot, value, len(calls)) for value in values]
        return scores

    before = _replace(trained.TrainedAdapter, "score", score)


def another_adapter_is_written(scheduler):
    from mezo.core.state import AdapterState

    manager = scheduler.tp_worker.model_runner.lora_manager
    (uid,) = (u for u, ref in manager.lora_refs.items() if ref.lora_name == "other")
    pool = manager.memory_pool
    name = sorted(pool.B_buffer)[-1]

    def perturb(state, step, eps):
        before(state, step, eps)
        pool.B_buffer[name][-1][pool.uid_to_buffer_id[uid]][0, 0].add_(2**-10)

    before = _replace(AdapterState, "perturb", perturb)


def weights_are_perturbed_for_good(scheduler):
    from mezo.core.state import AdapterState

    def perturb(state, step, eps):
        before(state, step, eps)
        state.arena[-1] = 1e-45  # of lora_B: no loss shows it

    before = _replace(AdapterState, "perturb", perturb)


def version_not_in_the_key(scheduler):
    from mezo.engines.sglang import trained

    def constant(lora_id):
        return None if before(lora_id) is None else 0

    before = _replace(trained, "served_version", constant)


def waiting_requests_keep_their_key(scheduler):
    from mezo.engines.sglang import compat

    _replace(compat, "has_kv", lambda request: True)


def prefill_graphs(scheduler):
    """No fault: SGLang's breakable prefill runner, without graphs."""
    from tests.support import eager_graphs

    runner = scheduler.tp_worker.model_runner
    backend, remove = eager_graphs.install(runner)
    _undo.append(remove)
    _captured.append((backend.replayed, eager_graphs.lora_addresses(runner)))


def graphs_were_replayed(scheduler):
    """Raise unless batches were replayed, some of them filled up, and adapters lie where they did.

    A graph reads an adapter's weights from where they were when it was captured.
    """
    from tests.support import eager_graphs

    replayed, addresses = _captured.pop()
    if not replayed or all(tokens == size for tokens, size in replayed):
        raise RuntimeError(f"graphs must have been replayed, got {replayed}")
    if not addresses or addresses != eager_graphs.lora_addresses(scheduler.tp_worker.model_runner):
        raise RuntimeError("the pool's tensors must stay in their places, got others")


def told_of_our_batches(scheduler):
    """Raise where the engine's own attention is told of a batch that ours does."""
    from mezo.engines.sglang.batch.attention import PairedAttention

    def tell(batch):
        if isinstance(runner.attn_backend, PairedAttention):
            raise RuntimeError("the engine's own attention must not be told of our batches")
        before(batch)

    runner = scheduler.tp_worker.model_runner
    before = _replace(runner.attn_backend, "init_forward_metadata", tell)


def every_layer_is_the_engines(scheduler):
    """Leave every layer to the engine's own attention; raise where it was not told, or twice."""
    from mezo.engines.sglang.batch import attention

    told = []

    def forward(*args, **kwargs):
        told.clear()
        return run(*args, **kwargs)

    def tell(batch):
        told.append(batch)
        before(batch)

    def attend(*args, **kwargs):
        if len(told) != 1:
            raise RuntimeError(f"the engine's own must be told once, got {len(told)} times")
        return own(*args, **kwargs)

    runner = scheduler.tp_worker.model_runner
    run = _replace(runner, "forward", forward)
    before = _replace(runner.attn_backend, "init_forward_metadata", tell)
    own = _replace(runner.attn_backend, "forward", attend)
    _replace(attention, "_is_plain", lambda layer: False)


def kv_enters_the_cache(scheduler):
    from mezo.engines.sglang import trained
    from mezo.engines.sglang.compat import Rank

    def score(adapter, rows, slots):
        scores = before(adapter, rows, slots)
        rank = Rank(scheduler)
        rank.insert((7,), rank.alloc_pages(1).reshape(-1), 0)
        return scores

    before = _replace(trained.TrainedAdapter, "score", score)
