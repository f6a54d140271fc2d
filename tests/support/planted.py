"""Faults that tests plant into the scheduler process of a running engine, by a message.

`install` makes this module a plugin of SGLang for the engines that are started next.
"""

from __future__ import annotations

from pathlib import Path

_undo = []


def install(directory: Path) -> None:
    """Write a plugin's metadata; spawned processes that have the directory on sys.path load it."""
    info = directory / "planted-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nplanted = {__name__}:register\n")


def register() -> None:
    """Called by SGLang in each of its processes, too early to import what needs SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.__init__", _add_operation, HookType.AFTER
    )


def _add_operation(result, *args, **kwargs):
    from mezo.engines.sglang import worker

    worker._OPERATIONS["plant"] = plant


def plant(scheduler, payload, agree):
    """Undo the fault from before and plant another, or none."""
    while _undo:
        _undo.pop()()
    if payload["fault"]:
        globals()[payload["fault"]](scheduler)
    return {}


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
    from mezo.engines.sglang import worker

    def swapped(*args, pairs, **others):
        return before(*args, pairs=[(minus, plus) for plus, minus in pairs], **others)

    before = _replace(worker, "AdapterState", swapped)


def adapter_not_applied(scheduler):
    for modules in scheduler.tp_worker.model_runner.lora_manager.lora_modules:
        for module in modules.values():
            _replace(module, "set_lora", False)


def theta_never_written(scheduler):
    from mezo.engines.sglang import worker

    _replace(worker, "publish_served", lambda lora_ids: None)


def signs_scored_apart(scheduler):
    def change(slot, value, call):
        return value * (1 + 2**-22) if slot.startswith("minus") else value

    _change_scores(change)


def base_moves(scheduler):
    _change_scores(lambda slot, value, call: value - 0.01 * call * (slot == "base"))


def _change_scores(change):
    from mezo.engines.sglang import worker

    calls = []

    def score(adapter, rows, slots):
        calls.append(None)
        scores = before(adapter, rows, slots)
        sums = scores.logprob_sums
        for slot, values in sums.items():
            sums[slot] = [change(slot, value, len(calls)) for value in values]
        return scores

    before = _replace(worker._Adapter, "score", score)


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
    from mezo.engines.sglang import worker

    def constant(lora_id):
        return None if before(lora_id) is None else 0

    before = _replace(worker, "served_version", constant)


def waiting_requests_keep_their_key(scheduler):
    from mezo.engines.sglang import compat

    _replace(compat, "has_kv", lambda request: True)


def kv_enters_the_cache(scheduler):
    from mezo.engines.sglang import worker
    from mezo.engines.sglang.compat import Rank

    def score(adapter, rows, slots):
        scores = before(adapter, rows, slots)
        rank = Rank(scheduler)
        rank.insert((7,), rank.alloc_pages(1).reshape(-1), 0)
        return scores

    before = _replace(worker._Adapter, "score", score)
