"""Checks of adapters that SGLang loads: what it would serve unlike PEFT is refused before.

SGLang reads r, lora_alpha, target_modules and use_dora of an adapter's config, and of its tensors
what their names contain. It ignores the rest, or the rest stops the engine at the first request.
Hooks around its loading check every field (`mezo.checkpoint.peft_fields`) and every tensor. They
change what is left so that SGLang serves it right: one scaling, one rank, whole fused projections.

`MEZO_CHECK_ADAPTERS=0` leaves ordinary adapters unchecked. Activated ones are ours, so they are
always checked.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mezo.checkpoint.peft_fields import (
    COPY,
    EMBEDDING,
    IGNORED,
    REFUSED,
    check_fields,
    field_against,
    is_activated,
    kind_of,
    rank_of,
    scaling_of,
    short,
)
from mezo.engines.linears import STACKED
from mezo.engines.sglang.adapter_places import Place, Places

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.lora.mem_pool import LoRAMemoryPool
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

_LOADING = "sglang.srt.lora"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def hooks() -> Iterator[tuple[str, Callable[..., object], str]]:
    """Yield (target, hook, kind) for SGLang's registry."""
    for target, hook, kind in (
        ("lora_config.LoRAConfig.__init__", _read_config, "AROUND"),
        ("lora_manager.LoRAManager.load_lora_adapter", _load, "AROUND"),
        ("lora_manager.LoRAManager.load_lora_adapter_from_tensors", _load, "AROUND"),
        ("lora_manager.LoRAManager.validate_new_adapter", _before_validation, "BEFORE"),
        ("lora.LoRAAdapter._process_weight", _before_tensor, "BEFORE"),
        ("lora.LoRAAdapter._normalize_weights", _before_stacking, "BEFORE"),
        ("mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer", _before_slot, "BEFORE"),
    ):
        yield f"{_LOADING}.{target}", hook, kind


def is_checked(config: Mapping[str, Any]) -> bool:
    """Whether an adapter with these fields is ours to check."""
    return is_activated(config) or os.environ.get("MEZO_CHECK_ADAPTERS", "1") != "0"


class _Check:
    """One adapter that is being loaded.

    Args:
        manager: SGLang's LoRAManager.
        name: the adapter's name.
        fields: its adapter_config.json.
    """

    def __init__(self, manager: LoRAManager, name: str, fields: Mapping[str, Any]) -> None:
        self.manager = manager
        self.name = name
        self.fields = fields
        self.places = Places(manager.base_model)
        self.found: dict[str, tuple[Place, str]] = {}  # tensor name -> its place, "A" or "B"
        self._taken: dict[tuple[int, str, str], str] = {}
        self.left_out: set[str] = set()
        self.is_partial = False  # whether some layers are on another pipeline stage

    def refuse(self, name: str, sentence: str) -> ValueError:
        """An error about a tensor."""
        return ValueError(f"adapter {self.name!r}: {name} {sentence}.")

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Check one tensor: its name, place, shape and dtype."""
        kind, match = kind_of(name)
        if kind.verdict == REFUSED:
            raise self.refuse(name, f"must be absent, got {kind.what}; {kind.note}")
        if kind.verdict == IGNORED:
            self.left_out.add(name)
            return
        try:
            place = self.places.find(match["path"])
        except LookupError as error:
            raise self.refuse(name, str(error)) from None
        if kind is COPY:
            self._see_copy(name, place, tensor)
        elif place is None:
            self.left_out.add(name)
            self.is_partial = True
        elif (place.module == "embed_tokens") != (kind is EMBEDDING):
            raise self.refuse(name, f"must be named as PEFT names it, got {kind.what}")
        else:
            self._see_factor(name, place, match["factor"], tensor)

    def _see_copy(self, name: str, place: Place | None, tensor: torch.Tensor) -> None:
        """Leave a copy of base weights out if it is one."""
        self.left_out.add(name)
        if place is not None and not place.equals_base(tensor):
            raise self.refuse(
                name,
                "must equal the engine's weights, got others; save the adapter with "
                "save_embedding_layers=False, or serve the model that it was trained on",
            )

    def _see_factor(self, name: str, place: Place, factor: str, tensor: torch.Tensor) -> None:
        """Check a lora_A or lora_B."""
        if place.module == "embed_tokens" and is_activated(self.fields):
            raise self.refuse(
                name, "must be absent from an activated adapter, as in PEFT; adapt linear layers"
            )
        if field := field_against(self.fields, place.path):
            value = short(self.fields.get(field))
            raise self.refuse(
                name,
                f"must be of a module that {field} lets be adapted, got {value}; PEFT would leave "
                "it out, so correct the field or the file",
            )
        rank = rank_of(self.fields, place.path)
        shape = (rank, place.d_in) if factor == "A" else (place.d_out, rank)
        if tuple(tensor.shape) != shape:
            raise self.refuse(
                name,
                f"must have shape {shape} (rank {rank} by r and rank_pattern, sizes by the "
                f"engine's model), got {tuple(tensor.shape)}; save it again from the whole weights "
                "of this model",
            )
        if tensor.dtype not in _DTYPES:
            raise self.refuse(
                name, f"must be fp32, fp16 or bf16, got {tensor.dtype}; save it as one of these"
            )
        self._see_pool(name, place, rank)
        key = (id(place.base), place.path.rpartition(".")[2], factor)
        if other := self._taken.get(key):
            raise self.refuse(name, f"must be the only lora_{factor} of its layer, got {other} too")
        self._taken[key] = name
        self.found[name] = (place, factor)

    def _see_pool(self, name: str, place: Place, rank: int) -> None:
        """Check that the engine has room for a factor, once its pool is there."""
        pool = getattr(self.manager, "memory_pool", None)
        if pool is None:  # an adapter of the engine's arguments: the pool is made for it
            return
        if place.module not in pool.target_modules:
            raise self.refuse(
                name,
                f"must be of a module in the engine's lora_target_modules "
                f"{sorted(pool.target_modules)}, got {place.module}; start the engine with it",
            )
        if rank > pool.max_lora_rank:
            raise self.refuse(
                name,
                f"must have at most the engine's max_lora_rank {pool.max_lora_rank}, got rank "
                f"{rank}; start the engine with max_lora_rank={rank}",
            )


def _read_config(
    original: Callable[..., None], config: LoRAConfig, *args: object, **kwargs: object
) -> None:
    """Say which field is missing, where SGLang says only its name."""
    try:
        original(config, *args, **kwargs)
    except KeyError as error:
        raise ValueError(
            f"adapter_config.json must have the field {error.args[0]}, got none; "
            "save the adapter with PEFT."
        ) from None


def _load(
    original: Callable[..., LoRAUpdateOutput],
    manager: LoRAManager,
    lora_ref: LoRARef,
    *args: object,
    **kwargs: object,
) -> LoRAUpdateOutput:
    """Load an adapter; after a failure forget what SGLang had noted of it."""
    path = str(getattr(lora_ref, "lora_path", ""))
    if _is_local(path) and not os.path.exists(path):
        return manager.create_lora_update_result(
            success=False,
            error_message=f"adapter {lora_ref.lora_name!r}: its path must be a directory with "
            f"PEFT's files, got {path!r}, which does not exist; check the path.",
        )
    result = original(manager, lora_ref, *args, **kwargs)
    if not result.success:
        manager.configs.pop(lora_ref.lora_id, None)
        manager.loras.pop(lora_ref.lora_id, None)
    return result


def _is_local(path: str) -> bool:
    """Whether a path cannot be a name on the hub, nor a run's (which has none)."""
    return not path.startswith("mezo:") and (
        os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1
    )


def _check_pool(manager: LoRAManager, name: str, fields: Mapping[str, Any]) -> None:
    """Say what does not fit into the engine's pool, where SGLang names it not."""
    pool = getattr(manager, "memory_pool", None)
    targets = fields["target_modules"]
    if pool is None or not isinstance(targets, list):
        return
    stacked = {piece: stack for stack, pieces in STACKED.items() for piece in pieces}
    leaves = {target.rpartition(".")[2] for target in targets}
    missing = sorted(n for n in leaves if not {n, stacked.get(n)} & set(pool.target_modules))
    if missing:
        raise ValueError(
            f"adapter {name!r}: target_modules must be in the engine's lora_target_modules "
            f"{sorted(pool.target_modules)}, got {missing} beside; start the engine with them."
        )
    if fields["r"] > pool.max_lora_rank and not fields.get("rank_pattern"):
        raise ValueError(
            f"adapter {name!r}: r must be at most the engine's max_lora_rank "
            f"{pool.max_lora_rank}, got {fields['r']}; start the engine with "
            f"max_lora_rank={fields['r']}."
        )


def _before_validation(manager: LoRAManager, lora_config: LoRAConfig, lora_ref: LoRARef) -> None:
    """Check the fields, and let what only tensors can tell pass SGLang's own checks."""
    fields = dict(lora_config.hf_config)
    is_ours = str(lora_ref.lora_path).startswith("mezo:")  # a run's slot, made by our worker
    if is_ours or not is_checked(fields):
        return
    check_fields(fields, lora_ref.lora_name)
    _check_pool(manager, lora_ref.lora_name, fields)
    lora_config.mezo_check = _Check(manager, lora_ref.lora_name, fields)
    if fields.get("rank_pattern"):
        lora_config.r = min(fields["r"], *fields["rank_pattern"].values())
    if not isinstance(fields["target_modules"], list):
        lora_config.target_modules = "all-linear"


def _before_tensor(adapter: LoRAAdapter, name: str, loaded_weight: torch.Tensor) -> None:
    """Check a tensor before SGLang files it by what its name contains."""
    check: _Check | None = getattr(adapter.config, "mezo_check", None)
    if check is not None:
        check.see(name, loaded_weight)


def _before_stacking(adapter: LoRAAdapter) -> None:
    """Give an adapter one scaling, one rank and whole fused projections."""
    check: _Check | None = getattr(adapter.config, "mezo_check", None)
    if check is None:
        return
    stores = [*(layer.weights for layer in adapter.layers), adapter.embedding_layers]
    for store in stores:
        for name in check.left_out & store.keys():
            del store[name]
    if not check.found:
        if check.is_partial:
            return
        raise ValueError(
            f"adapter {check.name!r}: the file must hold pairs of lora_A and lora_B, got none; "
            "save the adapter with PEFT."
        )
    _check_pairs(check)
    _make_uniform(adapter, check, stores)
    del adapter.config.mezo_check  # it holds the base model


def _make_uniform(
    adapter: LoRAAdapter, check: _Check, stores: list[dict[str, torch.Tensor]]
) -> None:
    """Write the file's scalings and ranks as one of each, and fill fused projections up."""
    places = {place.path: place for place, _ in check.found.values()}
    adapter.config.r = max(rank_of(check.fields, path) for path in places)
    scalings = {path: scaling_of(check.fields, path) for path in places}
    adapter.scaling = Counter(scalings.values()).most_common(1)[0][0] or 1.0
    for store in stores:
        for name in list(store):
            place, factor = check.found[name]
            factor_scale = scalings[place.path] / adapter.scaling if factor == "B" else 1.0
            store[name] = _padded(store[name], factor, adapter.config.r, factor_scale)
    for name, (place, _) in list(check.found.items()):
        _fill_group(stores, name, place, adapter.config.r)
    adapter.config.target_modules = sorted({path.split(".")[-1] for path in places})


def _check_pairs(check: _Check) -> None:
    """Raise unless every adapted layer has both factors."""
    factors: dict[str, dict[str, str]] = {}
    for name, (place, factor) in check.found.items():
        factors.setdefault(place.path, {})[factor] = name
    for name, (place, _) in check.found.items():
        parent, _, leaf = place.path.rpartition(".")
        if leaf != place.module and f"{parent}.{place.module}" in factors:
            raise check.refuse(name, f"must not be beside {place.module}, got both; keep one")
    for pair in factors.values():
        if len(pair) < 2:
            (factor,) = pair
            raise check.refuse(
                pair[factor],
                f"must come with its lora_{'B' if factor == 'A' else 'A'}, got only one; save the "
                "adapter again with PEFT",
            )


def _padded(tensor: torch.Tensor, factor: str, rank: int, scale: float) -> torch.Tensor:
    """A factor with zeros up to ``rank``, and scaled (in fp32, rounded when it is loaded)."""
    if scale != 1.0:
        tensor = tensor.float() * scale
    missing = rank - tensor.shape[0 if factor == "A" else 1]
    if missing == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing) if factor == "A" else (0, missing))


def _fill_group(stores: list[dict[str, torch.Tensor]], name: str, place: Place, rank: int) -> None:
    """Put zeros where a fused projection's neighbours have no adapter, in the same layer."""
    store = next(s for s in stores if name in s)
    leaf = place.path.split(".")[-1]
    dtype = store[name].dtype
    for piece, size in place.neighbours.items():
        a, b = (_renamed(name, leaf, piece, factor) for factor in "AB")
        if a not in store:
            store[a] = torch.zeros(rank, place.d_in, dtype=dtype)
            store[b] = torch.zeros(size, rank, dtype=dtype)


def _renamed(name: str, leaf: str, piece: str, factor: str) -> str:
    """The name of a neighbour's factor."""
    head, _, _ = name.rpartition(f".{leaf}.lora_")
    return f"{head}.{piece}.lora_{factor}.weight"


def _before_slot(
    pool: LoRAMemoryPool,
    uid: str | None,
    buffer_id: int,
    lora_adapter: LoRAAdapter,
    *_: object,
    **__: object,
) -> None:
    """Clear what SGLang leaves of a slot's last owner: the embedding's or lm_head's part."""
    if uid is None or not lora_adapter.embedding_layers:
        return
    for name in (
        "embedding_A_buffer",
        "embedding_B_buffer",
        "lm_head_A_buffer",
        "lm_head_B_buffer",
    ):
        for buffer in getattr(pool, name, {}).values():
            buffer[buffer_id].zero_()
