"""How much memory, and how many requests and tokens, an engine needs for a run's steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mezo._inputs import require
from mezo.config import MeZOConfig
from mezo.engines.sglang.model_checkpoint import Checkpoint

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

# What an engine on a CPU host has at least, whatever the run.
MIN_TOKENS = 32768
MIN_REQUESTS = 128
PREFILL_TOKENS = 16384  # SGLang's own max_prefill_tokens
_MIN_FRACTION, _MAX_FRACTION = 0.1, 0.95
_UNKNOWN_FRACTION = 0.8

# Longest row that still fits into one batch with all its copies, where memory allows.
_ROW_TOKENS = 512
# Options of one prompt that still fit into one batch with all copies of it.
_OPTIONS = 4
_OTHER_BYTES = 1 << 30  # activations, and the process itself


def slots_needed(config: MeZOConfig) -> int:
    """Adapter slots that a run needs: base, theta and a pair for each direction."""
    return 2 + 2 * config.num_directions


def check_server(who: str, args: ServerArgs | SimpleNamespace, config: MeZOConfig) -> None:
    """Raise where an engine with these server arguments could not hold a run.

    Args:
        who: whose sentence it is.
        args: SGLang's server arguments, or what is known of them.
        config: the run.

    Raises:
        ValueError: an argument that is too small, or that leaves out what the run needs.
        NotImplementedError: a parallelism or decoding mode that MeZO does not support.
    """
    require(
        bool(getattr(args, "enable_lora", True)),
        f"{who}: the engine must be started with enable_lora=True, got enable_lora=False; "
        "use mezo.launch_engine(model_path, config).",
    )
    needed = slots_needed(config)
    require(
        args.max_loras_per_batch is None or args.max_loras_per_batch >= needed,
        f"{who}: max_loras_per_batch must be at least {needed} (base, theta and a pair for "
        f"each of {config.num_directions} direction(s)), got {args.max_loras_per_batch}; "
        f"start the engine with max_loras_per_batch={needed}.",
    )
    for name, supported in (("pp_size", 1), ("dp_size", 1), ("speculative_algorithm", None)):
        value = getattr(args, name, supported)
        if value != supported:
            raise NotImplementedError(
                f"{who}: {name} must be {supported}, got {value!r}; "
                "scale with tensor parallelism (tp_size) instead."
            )


def check_pool_arguments(args: Mapping[str, Any], config: MeZOConfig) -> None:
    """Raise where an engine's arguments leave out what attach will ask of its pool and cache.

    Raises:
        ValueError: rank or target modules that the pool would not have.
        NotImplementedError: an activated run without a radix cache.
    """
    rank, modules = args.get("max_lora_rank"), args.get("lora_target_modules")
    require(
        rank is None or rank >= config.rank,
        f"launch_engine: max_lora_rank must be at least the run's rank {config.rank}, got {rank}; "
        "leave it out.",
    )
    names = {modules} if isinstance(modules, str) else set(modules or ())
    missing = sorted(set(config.target_modules) - names)
    require(
        not names or bool(names & {"all", "all-linear"}) or not missing,
        f"launch_engine: lora_target_modules must have the run's target_modules, got {modules!r} "
        f"without {missing}; leave it out, or add them.",
    )
    if config.prefix == "activated" and args.get("disable_radix_cache"):
        raise NotImplementedError(
            "launch_engine: prefix 'activated' keeps prompts in the radix cache, got "
            "disable_radix_cache=True; leave it out."
        )


def copies_of(config: MeZOConfig) -> int:
    """Copies of each row that a step runs in one batch: both signs of every direction."""
    return 2 * config.num_directions


def check_one_row(
    who: str, config: MeZOConfig, *, requests: int | None = None, tokens: int | None = None
) -> None:
    """Raise ValueError where an engine cannot run all copies of even the shortest row at once.

    Args:
        who: whose sentence it is.
        config: the run.
        requests: request slots of the engine, or None where that is not known.
        tokens: tokens that a batch may have, or None.
    """
    copies = copies_of(config)
    for name, least, got in (
        ("max_running_requests", copies, requests),
        ("max_total_tokens and max_prefill_tokens", 2 * copies, tokens),
    ):
        require(
            got is None or got >= least,
            f"{who}: {name} must be at least {least}, both signs of {config.num_directions} "
            f"direction(s) of one row in one batch, got {got}; start the engine with more, or "
            "lower num_directions.",
        )


def cpu_sizes(
    config: MeZOConfig,
    checkpoint: Checkpoint | None,
    args: Mapping[str, Any],
    free: int,
    cache_tokens: int = 0,
) -> dict[str, float]:
    """Choose a CPU engine's limits on requests, tokens and memory.

    Args:
        config: the run that is to fit.
        checkpoint: the model's sizes, or None where they are not known.
        args: the engine's arguments so far; what they fix stays as it is.
        free: bytes that may still be allocated on this host.
        cache_tokens: tokens to keep in the cache beside a batch, where memory allows.

    Returns:
        Arguments to add to ``args``.

    Raises:
        ValueError: the engine does not fit into the host's memory.
    """
    copies = copies_of(config)
    requests = max(MIN_REQUESTS, (1 + _OPTIONS) * copies)
    longest = _ROW_TOKENS
    if checkpoint is not None:
        longest = min(longest, checkpoint.max_row_tokens or longest)
    tokens = max(MIN_TOKENS, copies * longest) + cache_tokens
    sizes: dict[str, float] = {"max_running_requests": requests, "max_total_tokens": tokens}
    if copies * longest > PREFILL_TOKENS:
        sizes["max_prefill_tokens"] = copies * longest
    fraction = _UNKNOWN_FRACTION
    if checkpoint is not None:
        need = _Need(checkpoint, config, args)
        if args.get("max_total_tokens") is None:
            affordable = (free - need.fixed) // max(need.token, 1)
            sizes["max_total_tokens"] = max(copies * longest, min(tokens, affordable))
        total = need.fixed + need.token * int(
            args.get("max_total_tokens") or sizes["max_total_tokens"]
        )
        if args.get("mem_fraction_static") is None:
            require(total <= free, need.sentence(total, free))
        # Twice: SGLang's measure of free memory leaves out what files are cached in, and it counts
        # other processes' memory. The KV cache does not grow by it, max_total_tokens bounds it.
        fraction = min(max(2 * total / max(free, 1), _MIN_FRACTION), _MAX_FRACTION)
    sizes["mem_fraction_static"] = round(fraction, 3)
    return {name: value for name, value in sizes.items() if args.get(name) is None}


class _Need:
    """Bytes that an engine needs: ``fixed`` ones, and ``token`` for each token of its cache."""

    def __init__(self, checkpoint: Checkpoint, config: MeZOConfig, args: Mapping[str, Any]) -> None:
        self._config = config
        self._dtype = str(args["dtype"])
        item = 4 if self._dtype in ("float32", "float") else 2
        slots = int(args.get("max_loras_per_batch") or slots_needed(config))
        rank = int(args.get("max_lora_rank") or config.rank)
        modules = args.get("lora_target_modules") or config.target_modules
        modules = (modules,) if isinstance(modules, str) else modules
        self._weights = checkpoint.weight_bytes(item)
        # Every slot is there twice: in the pool, and as the fp32 adapter that SGLang keeps.
        self._slots = slots * checkpoint.adapter_elements(rank, modules) * (item + 4)
        self.token = checkpoint.kv_token_bytes(
            2 if str(args.get("kv_cache_dtype")) in ("bf16", "bfloat16") else item
        )
        self.fixed = self._weights + self._slots + _OTHER_BYTES

    def sentence(self, total: int, free: int) -> str:
        """What does not fit."""
        gib = [
            f"{nbytes / 2**30:.1f}"
            for nbytes in (total, free, self._weights, self._slots, total - self.fixed)
        ]
        return (
            f"launch_engine: the engine must fit into this host's free memory of {gib[1]} GiB, got "
            f"{gib[0]} GiB ({gib[2]} of weights in {self._dtype}, {gib[3]} of adapter slots for "
            f"{self._config.num_directions} direction(s) of rank {self._config.rank}, {gib[4]} of "
            "KV cache, the rest to run in); choose a smaller model, dtype='bfloat16', or fewer of "
            "num_directions, rank, target_modules and max_total_tokens."
        )
