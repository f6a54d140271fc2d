"""Attention of a scoring batch: a prefix is read once for all sequences that share it.

During our forward a `PairedAttention` is in front of the engine's attention backend. Batches that
are not ours, and layers that it cannot do, go to the engine's own. An engine that is started with
`attention_backend="mezo"` has one around the backend that SGLang would choose itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from mezo.engines.sglang.batch import attention_kernels
from mezo.engines.sglang.compat import Rank
from mezo.engines.sglang.cpu_host.host import is_cpu_host
from mezo_kernels import SharedPrefixPlan

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

NAME = "mezo"
_IS_NAMED = "MEZO_ATTENTION_IS_NAMED"


@dataclass(frozen=True)
class Member:
    """A sequence in a batch.

    Args:
        num_tokens: tokens of its own.
        prefix: names its prefix; members that name the same share it. None for no prefix.
        kv_slots: KV slots of the prefix.
    """

    num_tokens: int
    prefix: Hashable | None
    kv_slots: torch.Tensor | None


@dataclass(frozen=True)
class Grouping:
    """A batch's members by prefix, with the KV of the prefixes and what attends to them."""

    plan: SharedPrefixPlan
    pool: MHATokenToKVPool
    attend: attention_kernels.Kernel


def check_named_kernel(rank: Rank) -> None:
    """Raise where the environment asks for an attention kernel that cannot run here.

    Raises:
        ValueError: as `attention_kernels.check_named` does.
    """
    attention_kernels.named()
    pool = _pool_of(rank)
    if pool is not None:
        attention_kernels.check_named(pool.k_buffer[0], pool.v_buffer[0])


def group(rank: Rank, members: Sequence[Member]) -> Grouping | None:
    """Group the members of a batch by prefix; None where the engine's own attention is to run."""
    pool = _pool_of(rank)
    if pool is None:
        return None
    plan = _plan_of(members)
    keys = pool.k_buffer[0]
    model = rank.runner.model_config
    kernel = attention_kernels.choose(
        plan,
        device=keys.device,
        gqa=model.num_attention_heads // model.num_key_value_heads,
        head_dim=keys.shape[-1],
        engines_own=rank.runner.prefill_attention_backend_str,
    )
    if kernel == attention_kernels.ENGINE:
        return None
    return Grouping(plan, pool, attention_kernels.KERNELS[kernel])


def _pool_of(rank: Rank) -> MHATokenToKVPool | None:
    """The engine's KV pool, or None where only its own attention can read it."""
    pool = rank.kv_pool
    is_plain = hasattr(pool, "k_buffer") and pool.dtype == rank.runner.dtype
    return pool if is_plain else None


def _plan_of(members: Sequence[Member]) -> SharedPrefixPlan:
    groups: dict[Hashable, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(("alone", i) if member.prefix is None else member.prefix, []).append(i)
    kv_slots = [members[group[0]].kv_slots for group in groups.values()]
    prefixes = [torch.empty(0, dtype=torch.int64) if s is None else s for s in kv_slots]
    device = next((s.device for s in kv_slots if s is not None), torch.device("cpu"))
    return SharedPrefixPlan(
        _indptr(member.num_tokens for member in members),
        _indptr(len(group) for group in groups.values()),
        _indptr(len(prefix) for prefix in prefixes),
        torch.cat([prefix.to(device) for prefix in prefixes]),
        row_order=[i for group in groups.values() for i in group],
    )


def _indptr(sizes: Iterable[int]) -> list[int]:
    return [0, *accumulate(sizes)]


class PairedAttention:
    """An engine's attention backend, with the sequences of a batch grouped by their prefix.

    Without a grouping it is the engine's own backend: its calls, its attributes, and what is
    written to them.

    With one, the engine's own is not told of the batch before somebody uses it: a layer that is not
    done here, or a model that reads the backend's attributes.
    """

    _OWN = ("engines_own", "_grouping", "_untold", "_is_called")
    # What a model may read of a backend that knows nothing of the batch.
    _POOLS = ("token_to_kv_pool", "req_to_token_pool")

    def __init__(self, engines_own: AttentionBackend) -> None:
        self.engines_own = engines_own
        self._grouping: Grouping | None = None
        # The batch that the engine's own has not been told of.
        self._untold: ForwardBatch | None = None
        self._is_called = False

    @classmethod
    def around(cls, backend: AttentionBackend) -> PairedAttention:
        """The backend itself if it is one, else one in front of it."""
        return backend if isinstance(backend, cls) else cls(backend)

    @contextmanager
    def paired(self, grouping: Grouping) -> Iterator[None]:
        """Let the forward inside read each prefix of its batch once.

        Raises:
            RuntimeError: no layer of that forward came here.
        """
        self._grouping, self._is_called = grouping, False
        try:
            yield
            if not self._is_called:
                raise RuntimeError(
                    "a scoring batch's layers must call the engine's attention backend, got a "
                    "forward of which none did; start the engine with "
                    "cuda_graph_backend_prefill='disabled'."
                )
        finally:
            self._grouping = self._untold = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare for a batch; with a grouping, once the engine's own is used for it."""
        if self._grouping is None:
            self.engines_own.init_forward_metadata(forward_batch)
        else:
            self._untold = forward_batch

    def resolve_prefill_shared_read_ends(self, *args: object, **kwargs: object) -> object:
        """From when on a batch reads no table that the scheduler may overwrite (0.5.23)."""
        if self._untold is None:
            return self.engines_own.resolve_prefill_shared_read_ends(*args, **kwargs)
        from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

        return SharedReadEnds.UNKNOWN

    def _told(self) -> AttentionBackend:
        """The engine's own backend, ready for the batch."""
        if self._untold is not None:
            batch, self._untold = self._untold, None
            self.engines_own.init_forward_metadata(batch)
        return self.engines_own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engines_own if name in self._POOLS else self._told(), name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._told(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.engines_own, name)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: object,
    ) -> torch.Tensor:
        """`[T, H * D]` queries and the same tokens' keys and values -> `[T, H * D_v]`."""
        grouping = self._grouping
        self._is_called = True
        if grouping is None or kwargs or k is None or not _is_plain(layer):
            output: torch.Tensor = self._told().forward(
                q, k, v, layer, forward_batch, save_kv_cache, **kwargs
            )
            return output
        # The batch's own keys and values are read here and by nobody later: they are not stored.
        attended = grouping.attend(
            q.view(len(q), -1, layer.qk_head_dim),
            k.view(len(q), -1, layer.qk_head_dim),
            v.view(len(q), -1, layer.v_head_dim),
            grouping.pool.get_key_buffer(layer.layer_id),
            grouping.pool.get_value_buffer(layer.layer_id),
            plan=grouping.plan,
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
        )
        assert isinstance(attended, torch.Tensor)
        return attended.view(len(q), -1)


def _is_plain(layer: RadixAttention) -> bool:
    """Whether a layer is causal attention over everything before, and nothing else."""
    return (
        not layer.is_cross_attention
        and layer.attn_type.value == "decoder"
        and layer.sliding_window_size in (None, -1)
        and layer.pos_encoding_mode == "NONE"
        and layer.logit_capping_method == "tanh"
        and getattr(layer, "xai_temperature_len", -1) <= 0
        and not layer.use_irope
    )


def register_backend() -> None:
    """Make `attention_backend="mezo"` known to SGLang.

    SGLang decides much by a backend's name, so it goes on seeing its own: `resolve_name` puts that
    into the server's arguments, and the backends that are built then get ours in front.
    """
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    if os.environ.get(_IS_NAMED):
        for name, create in list(ATTENTION_BACKENDS.items()):
            register_attention_backend(name)(functools.partial(_in_front_of, create))


def _in_front_of(
    create: Callable[[ModelRunner], AttentionBackend], runner: ModelRunner
) -> PairedAttention:
    return PairedAttention.around(create(runner))


def resolve_name(server_args: ServerArgs) -> None:
    """Replace our name in new server arguments by SGLang's own choice, and remember it.

    Raises:
        ValueError: it is named only for prefill or only for decode.
    """
    for field in ("prefill_attention_backend", "decode_attention_backend"):
        if getattr(server_args, field, None) == NAME:
            raise ValueError(
                f"{field}: {NAME!r} must be named as attention_backend, which is for both kinds of "
                f"batches, got it as {field}; pass attention_backend={NAME!r}."
            )
    if server_args.attention_backend == NAME:
        # For the server's processes, which are started later. Arguments are resolved more than
        # once, so it stays; servers that this process starts afterwards get it, too.
        os.environ[_IS_NAMED] = "1"
        # On CPUs SGLang would choose one that needs AMX.
        server_args.attention_backend = "torch_native" if is_cpu_host() else None
