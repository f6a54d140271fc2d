"""`launch_engine`: an SGLang engine whose LoRA pool fits the run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mezo.config import MezoConfig
from mezo.engines import available
from mezo.sglang.cpu_host import is_cpu_host, prepare_import

# The settings under which SGLang runs on a CPU without AMX; every one may be overridden.
_CPU_ARGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "lora_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "mem_fraction_static": 0.1,
    "max_total_tokens": 32768,
    "max_running_requests": 128,
    "skip_server_warmup": True,
}

# Each layer makes and frees tensors of megabytes. glibc would return their pages to the kernel and
# fault them in again, which took 13 % of an exact step of SmolLM2-135M.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


def slots_needed(config: MezoConfig) -> int:
    """Adapter slots a run takes, with the base model's: base, theta and a pair a direction."""
    return 2 + 2 * config.num_directions


def launch_engine(
    model_path: str, config: MezoConfig | None = None, *, threads: int = 1, **server_args: Any
) -> Any:
    """Start an `sglang.Engine` in which ``config`` can be attached, on a GPU or a CPU host.

    Args:
        model_path: directory or hub name of the model.
        config: the run it has to hold; sizes the LoRA pool. Default ``MezoConfig()``.
        threads: CPU hosts: threads of each tensor-parallel rank.
        server_args: any argument of `sglang.Engine`; they go before what is chosen here.

    Returns:
        The engine. Call ``engine.shutdown()`` when done.

    Raises:
        ImportError: SGLang is missing here, of another version, or does not see our plugin.
    """
    config = config or MezoConfig()
    if reason := available()["sglang"]:
        raise ImportError(f"launch_engine: {reason}")
    prepare_import()
    with warnings.catch_warnings():
        if is_cpu_host():
            warnings.simplefilter("ignore")
        from sglang.srt.entrypoints.engine import Engine

    args: dict[str, Any] = {
        "model_path": model_path,
        "enable_lora": True,
        "max_lora_rank": config.rank,
        "max_loras_per_batch": slots_needed(config),
        "lora_target_modules": list(config.target_modules),
    }
    if not is_cpu_host():
        return Engine(**{**args, **server_args})
    args |= {**_CPU_ARGS, **server_args}
    return _launch_on_cpu(Engine, args, threads)


def _launch_on_cpu(engine_class: Any, args: dict[str, Any], threads: int) -> Any:
    """Start the engine with our process entry points (see `mezo.sglang.boot`)."""
    from mezo.sglang import boot

    class CpuEngine(engine_class):  # type: ignore[misc]
        run_scheduler_process_func = staticmethod(boot.run_scheduler_process)
        run_detokenizer_process_func = staticmethod(boot.run_detokenizer_process)

    ranks = int(args.get("tp_size", 1))
    variables = {"OMP_NUM_THREADS": str(threads), **_KEEP_PAGES}
    if ranks > 1:
        cores = [range(rank * threads, (rank + 1) * threads) for rank in range(ranks)]
        binding = "|".join(",".join(str(c % (os.cpu_count() or 1)) for c in cs) for cs in cores)
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = binding
    # SGLang's processes warn about every GPU kernel that this host cannot have.
    variables["PYTHONWARNINGS"] = "ignore"
    with _environment(variables):
        return CpuEngine(**args)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside; the user's own values win."""
    added = {k: v for k, v in variables.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
