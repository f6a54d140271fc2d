"""Our code in every scheduler process: answers messages about the adapters being trained.

Messages come over SGLang's RPC channel and are handled on the scheduler's main thread between
batches, in the same order in every tensor-parallel rank. Their types are in `mezo.core.messages`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mezo._host import fp32_products
from mezo.core import messages
from mezo.core.messages import Check
from mezo.core.rows import Rows, Scores
from mezo.core.step import ScoreFn, run_step
from mezo.core.wire import Answer, Failure, Message, WireError
from mezo.engines.selftest import GROUP
from mezo.engines.sglang import selftest, serve_alora, trained
from mezo.engines.sglang.batch import attention, logprobs, prefix
from mezo.engines.sglang.batch.score import check_budget, is_busy
from mezo.engines.sglang.compat import Rank
from mezo.engines.sglang.lora_slots import check_peft_names, parts_of
from mezo.engines.sglang.profile import Stopwatch, watched
from mezo.engines.sglang.ranks import Agreement, RankError, gathered

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import RpcReqInput, RpcReqOutput
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


def handle(scheduler: Scheduler, rpc: RpcReqInput) -> RpcReqOutput:
    """Answer one message (`Scheduler.handle_rpc_request`)."""
    from sglang.srt.managers.io_struct import RpcReqOutput

    fields = rpc.parameters or {}
    rank = Rank(scheduler)
    agree = Agreement(rank.tp_group.cpu_group)
    outcome: Any
    try:
        try:
            request = Message.read(fields).request()
            outcome = _HANDLERS[type(request)](rank, request, agree)
        except RankError:
            raise
        except Exception as error:
            if not isinstance(error, (ValueError, NotImplementedError, WireError)):
                logger.exception("mezo: operation %s failed", fields.get("operation"))
            agree(failure=Failure.of(error))
        if not agree.is_done:
            agree()
    except RankError as error:
        outcome = error.failure
    answer = Answer.of(str(fields.get("id")), outcome)
    try:
        text = answer.text()
    except (TypeError, ValueError) as error:  # a reply that JSON does not carry must not end SGLang
        answer = Answer.of(answer.id, Failure.of(error))
        text = answer.text()
    return RpcReqOutput(success=answer.error is None, message=text)


def _hello(rank: Rank, request: messages.Hello, agree: Agreement) -> messages.HelloReply:
    """Say what is here."""
    runner = rank.runner
    is_fp32_on_cpu = runner.device == "cpu" and runner.dtype == torch.float32
    return messages.HelloReply(
        pids=tuple(gathered(os.getpid(), rank.tp_group.cpu_group)),
        versions={"sglang": version("sglang"), "torch": torch.__version__},
        max_row_tokens=int(runner.model_config.context_len),
        vocab_size=int(runner.model_config.vocab_size),
        dtype=str(runner.model_config.dtype).removeprefix("torch."),
        fp32_products=fp32_products() if is_fp32_on_cpu else None,
    )


def _attach(rank: Rank, request: messages.Attach, agree: Agreement) -> messages.AttachReply:
    """Load the run's slots, pinned, and bind the adapter's state to them."""
    config, runner = request.config, rank.runner
    trained.check_pool(runner.lora_manager, config)
    check_budget(rank, config)
    logprobs.check_lm_head(rank)
    attention.check_named_kernel(rank)
    if config.prefix == "activated":
        prefix.check_cache(rank)
    parts = parts_of(runner.lora_manager, config.target_modules, config.rank)
    unnamed = check_peft_names(runner.model_config, parts, config.rank)
    why_not = serve_alora.why_not_servable(rank) if request.invocation else None
    trained.load(rank, request, parts, agree, is_served=why_not is None)
    return messages.AttachReply(
        partners={p.spec.name: p.spec.global_shape or () for p in parts if not p.is_target},
        not_served=why_not,
        unnamed=unnamed,
    )


def _step(rank: Rank, request: messages.Step, agree: Agreement) -> messages.StepReply:
    """Take one step."""
    adapter = trained.get(request.run)
    return run_step(adapter.state, _agreed(adapter, agree), request.request)


def _profile(rank: Rank, request: messages.Profile, agree: Agreement) -> messages.ProfileReply:
    """Take a step under a stopwatch."""
    watch = Stopwatch(rank.device)
    with watched(rank, watch), watch.part("engine"):
        reply = _step(rank, messages.Step(request.run, request.request), agree)
    seconds = dict(watch.seconds)
    seconds["engine"] -= reply.weights_s
    return messages.ProfileReply({**seconds, "weights": reply.weights_s})


def _agreed(adapter: trained.TrainedAdapter, agree: Agreement) -> ScoreFn:
    """The adapter's forward; every rank goes on with rank 0's scores."""

    def score(rows: Rows, slots: Sequence[str]) -> Scores:
        scores: Scores = agree(adapter.score(rows, slots))
        return scores

    return score


def _score(rank: Rank, request: messages.Score, agree: Agreement) -> Scores:
    """Score rows under one slot."""
    return trained.get(request.run).score(request.rows, [request.slot])


def _selftest(rank: Rank, request: messages.Selftest, agree: Agreement) -> messages.SelftestReply:
    """Check the engine with the run's own slots; see `mezo.engines.sglang.selftest`."""
    adapter, rows = trained.get(request.run), request.rows
    if is_busy(rank, rows, 2 + min(2 * adapter.state.num_directions, GROUP)):
        reason = "the engine has no room for its rows now, as other requests run"
        return messages.SelftestReply((Check("engine", True, reason, is_skipped=True),))
    found = selftest.checks(rank, adapter, rows, adapter.invocation, _agreed(adapter, agree))
    return messages.SelftestReply(selftest.merged(gathered(found, rank.tp_group.cpu_group)))


def _apply_updates(rank: Rank, request: messages.ApplyUpdates, agree: Agreement) -> messages.Done:
    """Take steps whose coefficients are known."""
    trained.get(request.run).state.take_steps(request.step, request.coefficients)
    return messages.Done()


def _progress(rank: Rank, request: messages.Progress, agree: Agreement) -> messages.ProgressReply:
    """Say how many steps were taken, and what was replied to the last one."""
    state = trained.get(request.run, is_loaded=False).state
    return messages.ProgressReply(state.steps, state.last_reply)


def _export(rank: Rank, request: messages.Export, agree: Agreement) -> messages.ExportReply:
    """Gather the fp32 masters of all ranks; rank 0 writes them to a file."""
    from safetensors.torch import save_file

    group = rank.tp_group.cpu_group
    everyone = gathered(trained.get(request.run, is_loaded=False).state.pack(), group)
    if dist.get_rank(group) == 0:
        save_file({str(rank): arena for rank, (_, arena) in enumerate(everyone)}, request.path)
    return messages.ExportReply(tuple(specs for specs, _ in everyone))


def _set_weights(rank: Rank, request: messages.SetWeights, agree: Agreement) -> messages.Done:
    """Read a file of whole tensors; every rank keeps its part."""
    from safetensors.torch import load_file

    trained.get(request.run).state.set_weights(load_file(request.path))
    return messages.Done()


def _detach(rank: Rank, request: messages.Detach, agree: Agreement) -> messages.Done:
    """Take the run's slots out of the pool."""
    trained.unload(rank, request.run, request.uids)
    return messages.Done()


def _memory(rank: Rank, request: messages.Memory, agree: Agreement) -> messages.MemoryReply:
    """Count what is free, for leak checks."""
    adapters = len(rank.lora_manager.configs)
    return messages.MemoryReply(**rank.free_memory(), adapters=adapters)


def _fingerprint(
    rank: Rank, request: messages.Fingerprint, agree: Agreement
) -> messages.FingerprintReply:
    """Digest the base weights and every slot of the pool on rank 0, to tell what changed."""
    names = rank.lora_names
    slots = {
        str(names.get(uid, uid)): _digest(rank.slot_tensors(index))
        for uid, index in rank.lora_pool.uid_to_buffer_id.items()
    }
    parameters = rank.model.parameters()
    return messages.FingerprintReply(_digest(parameters), slots)


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """blake2s of the tensors' bytes."""
    digest = hashlib.blake2s()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Each returns the reply that its request's type names.
_HANDLERS: dict[type[messages.Request[Any]], Callable[[Rank, Any, Agreement], Any]] = {
    messages.Hello: _hello,
    messages.Attach: _attach,
    messages.Step: _step,
    messages.Profile: _profile,
    messages.Score: _score,
    messages.Selftest: _selftest,
    messages.ApplyUpdates: _apply_updates,
    messages.Progress: _progress,
    messages.Export: _export,
    messages.SetWeights: _set_weights,
    messages.Detach: _detach,
    messages.Memory: _memory,
    messages.Fingerprint: _fingerprint,
}
