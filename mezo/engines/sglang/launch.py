"""`launch_engine`: an SGLang engine whose LoRA pool and limits fit the run."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mezo._arguments import checked_config
from mezo._inputs import checked_integer
from mezo.config import MeZOConfig
from mezo.engines import EngineError
from mezo.engines.sglang.cpu_host.host import free_memory, is_cpu_host, prepare_import
from mezo.engines.sglang.engine import why_not
from mezo.engines.sglang.graphs import (
    checked_step_tokens,
    graph_arguments,
    has_breakable_graphs,
)
from mezo.engines.sglang.model_checkpoint import read_checkpoint
from mezo.engines.sglang.server_arguments import check_args, check_cpu_args, plain_numbers
from mezo.engines.sglang.sizing import (
    check_one_row,
    check_pool_arguments,
    check_server,
    cpu_sizes,
    slots_needed,
)

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from zmq.sugar.context import Context
    from zmq.sugar.socket import Socket

# The settings under which SGLang runs on a CPU without AMX; every one may be overridden.
_CPU_ARGS: dict[str, object] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "lora_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "skip_server_warmup": True,
}

# Each layer makes and frees tensors of megabytes. glibc would return their pages to the kernel and
# fault them in again, which took 13 % of an exact step of SmolLM2-135M.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest that glibc accepts
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


def launch_engine(
    model_path: str | os.PathLike[str],
    config: MeZOConfig | None = None,
    *,
    threads: int | None = None,
    step_tokens: int | Sequence[int] | None = None,
    cache_tokens: int = 0,
    **server_args: Any,
) -> Engine:
    """Start an `sglang.Engine` in which ``config`` can be attached, on a GPU or a CPU host.

    On a CPU host the limits on memory, requests and tokens follow from the checkpoint's size, the
    config and the memory that is free here. On an NVIDIA GPU the steps of ``config`` replay
    prefill CUDA graphs of a few sizes.

    Args:
        model_path: directory or hub name of the model.
        config: the run it has to hold; sizes the LoRA pool. Default ``MeZOConfig()``.
        threads: CPU hosts: threads of each tensor-parallel rank. Default the environment's
            OMP_NUM_THREADS, else 1.
        step_tokens: NVIDIA GPUs: tokens of a step's batch (of a `StepResult` its ``tokens`` without
            its ``prompt_tokens``), or the least and the most of them. Graphs are captured for
            these. Default: for 16 to 512 tokens; larger steps then run without.
        cache_tokens: CPU hosts: tokens of prompts to keep in the cache beside a step's batch, as
            far as memory goes. On a GPU the cache has what SGLang leaves it.
        server_args: any argument of `sglang.Engine`; they override what is chosen here.

    Returns:
        The engine. Call ``engine.shutdown()`` when done.

    Raises:
        ImportError: SGLang is missing here, of another version, or does not see our plugin.
        TypeError: ``config`` is no `MeZOConfig`.
        ValueError: no model at ``model_path``, an argument that SGLang does not have, or an engine
            that would not fit into this host's memory or could not hold one row of any step.
        NotImplementedError: what SGLang does not have on CPU hosts (quantised weights, say), or
            CUDA graphs that steps cannot replay.
        EngineError: SGLang cannot start, with the reason; its processes are gone by then.
    """
    has_run = config is not None
    config = checked_config("launch_engine", config)
    if threads is not None:
        expected, remedy = "an integer >= 1", "use 1, or leave it out"
        threads = checked_integer("launch_engine: threads", threads, 1, None, expected, remedy)
    step_tokens = checked_step_tokens(step_tokens)
    cache_tokens = checked_integer(
        "launch_engine: cache_tokens", cache_tokens, 0, None, "an integer >= 0", "leave it out"
    )
    if reason := why_not():
        raise ImportError(f"launch_engine: {reason}")
    checkpoint = read_checkpoint(model_path, server_args.get("revision"))
    args: dict[str, Any] = {
        "model_path": os.fspath(model_path),
        "enable_lora": True,
        "max_lora_rank": config.rank,
        "max_loras_per_batch": slots_needed(config),
        "lora_target_modules": list(config.target_modules),
    }
    if is_cpu_host():
        args |= _CPU_ARGS
    args = plain_numbers(args | server_args)
    if has_run:  # else the engine may be for serving only
        check_server("launch_engine", SimpleNamespace(**args), config)
        check_pool_arguments(args, config)
        if has_breakable_graphs(args):
            args |= graph_arguments(args, config, step_tokens)
    tokens = [args[n] for n in ("max_total_tokens", "max_prefill_tokens") if args.get(n)]
    check_one_row(
        "launch_engine",
        config,
        requests=args.get("max_running_requests"),
        tokens=min(tokens, default=None),
    )
    if is_cpu_host():
        check_cpu_args(args, checkpoint)
        args |= cpu_sizes(config, checkpoint, args, free_memory(), cache_tokens)
    engine_class = _engine_class()
    check_args(args)
    variables = _cpu_environment(args, threads) if is_cpu_host() else {}
    # An explicit number of threads goes before the environment's; of the rest the user's own win.
    forced = {"OMP_NUM_THREADS"} if threads is not None else set()
    with _environment(variables, forced):
        return _start(engine_class, args)


def _engine_class() -> type[Engine]:
    """SGLang's engine with our process entry points (see `mezo.engines.sglang.cpu_host.spawn`)."""
    prepare_import()
    with warnings.catch_warnings():
        if is_cpu_host():
            warnings.simplefilter("ignore")
        from sglang.srt.entrypoints.engine import Engine
    from mezo.engines.sglang.cpu_host import spawn

    class MezoEngine(Engine):  # type: ignore[misc]
        run_scheduler_process_func = staticmethod(spawn.run_scheduler_process)
        run_detokenizer_process_func = staticmethod(spawn.run_detokenizer_process)

        def __init__(self, **kwargs: object) -> None:
            try:
                super().__init__(**kwargs)
            except BaseException:
                # At exit it would end every child of this process.
                atexit.unregister(self.shutdown)
                raise

    return MezoEngine


def _cpu_environment(args: Mapping[str, Any], threads: int | None) -> dict[str, str]:
    """Environment variables of the processes of an engine on a CPU host."""
    count = threads
    if count is None:
        given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # "4,2": of nested levels
        count = int(given) if given.isdecimal() and int(given) > 0 else 1
    variables = {"OMP_NUM_THREADS": str(count), **_KEEP_PAGES}
    ranks = int(args.get("tp_size") or 1)
    if ranks > 1:
        cores = [range(rank * count, (rank + 1) * count) for rank in range(ranks)]
        binding = "|".join(",".join(str(c % (os.cpu_count() or 1)) for c in cs) for cs in cores)
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = binding
    # SGLang's processes warn about every GPU kernel that this host cannot have.
    variables["PYTHONWARNINGS"] = "ignore"
    return variables


def _start(engine_class: type[Engine], args: dict[str, Any]) -> Engine:
    """Start an engine; where it cannot start, end its processes and raise the reason.

    Raises:
        EngineError: SGLang's own refusal, or what a process of it left in its report.
    """
    from mezo.engines.sglang.cpu_host import spawn

    before = _Before()
    engine, failure = None, None
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report"
        try:
            with _environment({spawn.REPORT: str(report)}, {spawn.REPORT}):
                engine = engine_class(**args)
        except Exception as error:
            failure = error
        finally:
            # Also after Ctrl-C, which is not an `Exception`.
            if engine is None:
                before.restore()
        reason = report.read_text(encoding="utf-8") if report.is_file() else None
    if failure is None and reason is None:
        return engine
    if engine is not None:  # its detokenizer has ended
        atexit.unregister(engine.shutdown)
        if watchdog := getattr(engine.tokenizer_manager, "_subprocess_watchdog", None):
            watchdog.stop()
        before.restore()
    got = " ".join((reason or f"{type(failure).__name__}: {failure}").split())
    raise EngineError(
        f"launch_engine: SGLang must start with these arguments, got {got.rstrip('.')}; change "
        "what it names, and see SGLang's messages above."
    ) from failure


class _Before:
    """What this process had before an engine was started, to remove what a failure leaves."""

    def __init__(self) -> None:
        self._children = set(multiprocessing.active_children())
        self._handler = signal.getsignal(signal.SIGQUIT)
        self._contexts = _zmq_contexts()

    def restore(self) -> None:
        """End the processes and close the sockets that came since; put SIGQUIT's handler back."""
        for process in set(multiprocessing.active_children()) - self._children:
            process.kill()
            process.join()
        # Their messages to dead processes would block whoever collects them.
        for context in _zmq_contexts():
            if all(context is not known for known in self._contexts):
                context.destroy(linger=0)
        # SGLang's handler kills this process.
        if threading.current_thread() is threading.main_thread() and self._handler is not None:
            signal.signal(signal.SIGQUIT, self._handler)


def _zmq_contexts() -> list[Context[Socket[bytes]]]:
    """All contexts of this process that are open; SGLang keeps them out of reach."""
    from zmq.sugar.context import Context

    found = [o for o in gc.get_objects() if issubclass(type(o), Context)]
    return [context for context in found if not context.closed]


@contextmanager
def _environment(variables: Mapping[str, str], forced: set[str]) -> Iterator[None]:
    """Set variables for the processes started inside; the user's own win, but for ``forced``."""
    changed = {k: v for k, v in variables.items() if k in forced or k not in os.environ}
    before = {k: os.environ.get(k) for k in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
