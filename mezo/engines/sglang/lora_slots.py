"""Where the adapter's tensors lie in SGLang's LoRA pool on this rank.

The pool (`srt/lora/mem_pool.py`) holds `A_buffer[module][layer]` [slots, max_rank * c, d_in] and
`B_buffer[module][layer]` [slots, d_out, max_rank]; c is 3 for qkv_proj, 2 for gate_up_proj, else 1.
Stacked A is packed by the adapter's own rank; B uses its first r columns. Tensor parallelism cuts
A's columns (row-parallel modules) or B's rows (column-parallel ones).

A checkpoint whose own layer is stacked (Phi-3's qkv_proj) has one A and one B for it. SGLang's slot
then holds that A once for each piece, so the part is there several times, under one name: equal
names have equal z and equal initial values, and so the copies stay equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mezo.engines.linears import STACKED, ModelLinears, check_names, linears_of
from mezo_kernels import TensorSpec

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.lora.layers import BaseLayerWithLoRA
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.mem_pool import LoRAMemoryPool


@dataclass(frozen=True)
class Part:
    """One adapter tensor on this rank and its place in a slot.

    Args:
        spec: which elements of which tensor.
        factor: "A" or "B".
        module: SGLang's name of the (stacked) module, without its path.
        layer: layer number.
        row0: first row of the part inside the slot.
        is_target: whether the run trains it; stacked neighbours that it does not stay 0.
    """

    spec: TensorSpec
    factor: str
    module: str
    layer: int
    row0: int
    is_target: bool

    def view(self, pool: LoRAMemoryPool, slot: int) -> torch.Tensor:
        """The part's elements in ``slot``, a strided view of the pool."""
        rows, cols = self.spec.shape
        buffers = pool.A_buffer if self.factor == "A" else pool.B_buffer
        view: torch.Tensor = buffers[self.module][self.layer][slot][
            self.row0 : self.row0 + rows, :cols
        ]
        return view


def parts_of(manager: LoRAManager, target_modules: Sequence[str], rank: int) -> list[Part]:
    """List the adapter tensors of this rank, layer by layer.

    Args:
        manager: SGLang's LoRAManager.
        target_modules: PEFT's names.
        rank: the adapter's rank r.

    Returns:
        The parts; stacked modules come whole, with `is_target` telling the trained ones. A target
        that names the stack itself is trained as one layer, as PEFT would.

    Raises:
        ValueError: a target module that is not in the engine's LoRA pool.
        NotImplementedError: a module kind without a plain 2-D adapter (experts, embeddings).
    """
    wanted = set(target_modules)
    parts: list[Part] = []
    served: set[str] = set()
    for layer, modules in enumerate(manager.lora_modules):
        for path, module in modules.items():
            prefix, _, name = path.rpartition(".")
            pieces = STACKED.get(name, (name,))
            served.update((name, *pieces))
            if wanted.isdisjoint((name, *pieces)):
                continue
            if name in wanted and not wanted.isdisjoint(set(pieces) - {name}):
                raise ValueError(
                    f"attach: target_modules must name {name!r} or its pieces, got both "
                    f"{name!r} and {sorted(wanted & set(pieces))}; keep those of the checkpoint."
                )
            if name not in manager.memory_pool.A_buffer or not hasattr(
                module.base_layer, "output_size"
            ):
                raise NotImplementedError(
                    f"attach: target_modules must be plain linear layers, got {path} "
                    f"({type(module.base_layer).__name__}); train the attention projections."
                )
            parts += _module_parts(module, prefix, name, pieces, layer, rank, wanted)
    missing = sorted(wanted - served)
    if missing:
        raise ValueError(
            f"attach: target_modules must be in the engine's LoRA pool, got {missing} but the pool "
            f"has {sorted(served)}; start the engine with lora_target_modules that include them."
        )
    return parts


def check_peft_names(model_config: ModelConfig, parts: Sequence[Part], rank: int) -> str | None:
    """Compare the trained parts with the checkpoint's linear layers in transformers.

    Args:
        model_config: SGLang's ModelConfig.
        parts: from `parts_of`.
        rank: the adapter's rank.

    Returns:
        None, or why they could not be compared.

    Raises:
        ValueError: PEFT would not find a tensor, or with another shape; see `check_names`.
    """
    linears = linears_of(model_config.hf_config)
    if not isinstance(linears, ModelLinears):
        return linears
    trained = [part.spec for part in parts if part.is_target]
    check_names([(s.name, s.global_shape or s.shape) for s in trained], linears, rank)
    return None


def _module_parts(
    module: BaseLayerWithLoRA,
    prefix: str,
    name: str,
    pieces: Sequence[str],
    layer: int,
    rank: int,
    wanted: set[str],
) -> list[Part]:
    """Parts of one (stacked) module: for each piece lora_A, then lora_B."""
    base = module.base_layer
    is_whole = name in wanted and len(pieces) > 1
    # SGLang's own slicing of row and column numbers tells which elements this rank holds.
    d_in, sizes = int(base.input_size), piece_sizes(base, len(pieces))
    columns: torch.Tensor = module.slice_lora_a_weights(torch.arange(d_in)[None, :])[0]
    rows: torch.Tensor = module.slice_lora_b_weights(torch.arange(sum(sizes))[:, None])[:, 0]
    parts, first_row = [], 0
    for k, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        own, offset, total = (name, 0, sum(sizes)) if is_whole else (piece, first_row, size)
        local = ((rows >= first_row) & (rows < first_row + size)).nonzero()[:, 0]
        for factor, spec, row0 in (
            (
                "A",
                TensorSpec(
                    f"{prefix}.{own}.lora_A",
                    (rank, len(columns)),
                    col0=_start_of_run(columns),
                    global_shape=(rank, d_in),
                ),
                k * rank,
            ),
            (
                "B",
                TensorSpec(
                    f"{prefix}.{own}.lora_B",
                    (len(local), rank),
                    row0=_start_of_run(rows[local]) - offset,
                    global_shape=(total, rank),
                ),
                _start_of_run(local),
            ),
        ):
            parts.append(Part(spec, factor, name, layer, row0, own in wanted))
        first_row += size
    return parts


def piece_sizes(base: LinearBase, num_pieces: int) -> list[int]:
    """Global output rows of each piece of a (stacked) linear layer."""
    if hasattr(base, "total_num_kv_heads"):
        v_head_size = getattr(base, "v_head_size", base.head_size)
        return [
            base.total_num_heads * base.head_size,
            base.total_num_kv_heads * base.head_size,
            base.total_num_kv_heads * v_head_size,
        ]
    if num_pieces > 1:
        return [int(size) for size in base.output_sizes[:num_pieces]]
    return [int(base.output_size)]


def _start_of_run(index: torch.Tensor) -> int:
    """First of consecutive numbers."""
    start = int(index[0])
    assert torch.equal(index, torch.arange(start, start + len(index))), "a part must be contiguous"
    return start
