"""What differs between the versions of SGLang, in one place. The installed version chooses, once.

| | 0.5.17, 0.5.18 | 0.5.19 | 0.5.20, 0.5.21 | 0.5.22, 0.5.23 |
|---|---|---|---|---|
| tokens that a request runs | `set_extend_range` | same | same | `extend_end` |
| its prefix in the cache | `prefix_indices` | same | same | `prefix_len` |
| its tokens that the cache owns | `cache_protected_len` | `kv.cache_protected_len` | same | same |
| its request slot | `req_pool_idx` | `kv.req_pool_idx` | same | same |
| a match in the cache | `device_indices` | same | same | `device_prefix_len` |
| a lock in the cache | `inc_lock_ref` | same | same | `lock` |
| settings are derived in | `__post_init__` | `resolve_once` | same | same |
| `ServerArgs` | dataclass | dataclass | msgspec struct | same |
| `update_request_meta_info` | no | yes | yes | yes |
| activated adapters are served | no | no | no | yes |

The wheels of all seven versions were read for it; 0.5.17 and 0.5.23 run in tests. Nothing of SGLang
is imported here, because SGLang registers plugins before most of it can be imported.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, MatchResult
    from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True)
class CachedPrefix:
    """The part of a prompt that is in the radix cache under the base model's key.

    Args:
        length: tokens of it; whole pages.
        node: the cache's node that ends it.
        kv_slots: its KV slots where a request must name them (before 0.5.22), else None.
    """

    length: int
    node: object
    kv_slots: torch.Tensor | None


class Era:
    """SGLang 0.5.22 and 0.5.23. Older versions are subclasses.

    Attributes:
        serves_activated: whether requests for activated adapters can be served.
        tells_meta_info: whether `TokenizerManager.update_request_meta_info` exists.
        resolution: the method of `ServerArgs` that derives settings from the arguments.
    """

    serves_activated = True
    tells_meta_info = True
    resolution = "resolve_once"

    def run_from(self, request: Req, start: int) -> None:
        """Let a request run its prompt's tokens from ``start`` on."""
        request.extend_end = len(request.origin_input_ids)
        request.prefix_len = start

    def use_prefix(self, request: Req, prefix: CachedPrefix) -> None:
        """Let a request use the KV of its first tokens."""
        self.run_from(request, prefix.length)
        self.set_protected(request, prefix.length)
        request.last_node = request.last_host_node = request.best_match_node = prefix.node

    def set_protected(self, request: Req, length: int) -> None:
        """Note on a request how many of its first tokens the cache owns."""
        request.kv.cache_protected_len = length

    def cached_tokens(self, request: Req) -> int:
        """How many of its tokens a request has found in a cache."""
        return int(request.prefix_len)

    def req_slot(self, request: Req) -> int | None:
        """A request's slot, or None before it has one."""
        slot: int | None = request.kv.req_pool_idx
        return slot

    def mark_released(self, request: Req) -> None:
        """Note on a request that its KV is not its own any more."""
        request.kv.mark_kv_released()

    def prefix_of(self, found: MatchResult) -> CachedPrefix:
        """What a look-up in the cache has found."""
        return CachedPrefix(int(found.device_prefix_len), found.last_device_node, None)

    def kv_slots(self, tree: BasePrefixCache, prefix: CachedPrefix) -> torch.Tensor:
        """KV slots of a prefix in the cache."""
        slots: torch.Tensor = tree.path_device_indices(prefix.node)[: prefix.length]
        return slots

    def lock(self, tree: BasePrefixCache, node: object) -> object:
        """Keep a node and its ancestors from eviction; returns what `unlock` needs."""
        return tree.lock(node)

    def unlock(self, tree: BasePrefixCache, handle: object) -> None:
        """Undo `lock`."""
        tree.unlock(handle)

    def argument_names(self, server_args: type[ServerArgs]) -> list[str]:
        """Names of the server's arguments."""
        return list(server_args.__struct_fields__)


class Era0520(Era):
    """SGLang 0.5.20 and 0.5.21: a request holds an extend range and its prefix's KV slots."""

    serves_activated = False

    def run_from(self, request: Req, start: int) -> None:
        """As `Era`."""
        request.set_extend_range(start, len(request.origin_input_ids))

    def use_prefix(self, request: Req, prefix: CachedPrefix) -> None:
        """As `Era`."""
        request.prefix_indices = prefix.kv_slots
        super().use_prefix(request, prefix)

    def cached_tokens(self, request: Req) -> int:
        """As `Era`."""
        return len(request.prefix_indices)

    def prefix_of(self, found: MatchResult) -> CachedPrefix:
        """As `Era`."""
        slots: torch.Tensor = found.device_indices
        return CachedPrefix(len(slots), found.last_device_node, slots)

    def kv_slots(self, tree: BasePrefixCache, prefix: CachedPrefix) -> torch.Tensor:
        """As `Era`."""
        assert prefix.kv_slots is not None, "a prefix must come with its KV slots"
        return prefix.kv_slots

    def lock(self, tree: BasePrefixCache, node: object) -> object:
        """As `Era`."""
        tree.inc_lock_ref(node)
        return node

    def unlock(self, tree: BasePrefixCache, handle: object) -> None:
        """As `Era`."""
        tree.dec_lock_ref(handle)


class Era0519(Era0520):
    """SGLang 0.5.19: the server's arguments are a dataclass."""

    def argument_names(self, server_args: type[ServerArgs]) -> list[str]:
        """As `Era`."""
        return [field.name for field in dataclasses.fields(server_args)]


class Era0517(Era0519):
    """SGLang 0.5.17 and 0.5.18: a request has no KV record."""

    tells_meta_info = False
    resolution = "__post_init__"

    def set_protected(self, request: Req, length: int) -> None:
        """As `Era`."""
        request.cache_protected_len = length

    def req_slot(self, request: Req) -> int | None:
        """As `Era`."""
        slot: int | None = request.req_pool_idx
        return slot

    def mark_released(self, request: Req) -> None:
        """Nothing to note."""


_OLDER = {
    "0.5.17": Era0517,
    "0.5.18": Era0517,
    "0.5.19": Era0519,
    "0.5.20": Era0520,
    "0.5.21": Era0520,
}


def era_of(sglang: str) -> Era:
    """The era of a version of SGLang, such as "0.5.23" or "0.5.21.post1"."""
    number = ".".join(re.findall(r"\d+", sglang)[:3])
    return _OLDER.get(number, Era)()


def _installed() -> Era:
    """The era of the installed SGLang; the newest where it says no version, or is missing."""
    try:
        return era_of(version("sglang"))
    except PackageNotFoundError:
        return Era()


ERA = _installed()
