"""LoRA of a batch whose rows belong to several adapters, for hosts without a GPU."""

from collections.abc import Sequence

import torch

from mezo_kernels import _native
from mezo_kernels.backends import CPU_NATIVE, REFERENCE, register, resolve

register(
    "SegmentedLora",
    needs={"reference": REFERENCE, "cpu": CPU_NATIVE},
    follows_environment=False,
)


class SegmentedLora:
    """Multiply segments of a batch by the LoRA factors of their adapters.

        h[t] = scaling_s * A_s x[t],   out[t] += B_s h[t],   t in segment s

    Build it once per batch and use it in every layer. On a GPU the engines' own segmented kernels
    do this. On a CPU the engines loop over adapters and slices; this is one call for all of them.

    Args:
        indptr: `[N + 1]` ints that never decrease, the rows of the segments.
        slots: N numbers of the adapters' slots in the weights; None for rows without an adapter.
        scalings: N factors, alpha / r.
        rank: r of all adapters in the batch.
        backend: "reference" | "cpu" | None: cpu for fp32 where the native module is built.

    Raises:
        ValueError: lengths that do not match, rows that decrease, a rank below 1, or an unknown
            backend name.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: cpu: fp32; a dot product is 16 running sums and a tree over them, the ranks are added
    to ``out`` one by one: the same bits on every instruction set, for every number of threads, and
    for a row whatever the other rows are. The reference computes in the dtype of its inputs.
    Graph-safe: no. Cost: x, out and the factors are touched once; h is `[T, slices * r]`.
    Source: Chen et al. 2023 (arXiv 2310.18547) for segments that gather their adapters.
    """

    def __init__(
        self,
        indptr: Sequence[int],
        slots: Sequence[int | None],
        scalings: Sequence[float],
        rank: int,
        *,
        backend: str | None = None,
    ) -> None:
        if not len(indptr) - 1 == len(slots) == len(scalings):
            raise ValueError(
                "SegmentedLora: indptr must have one entry more than slots and scalings, got "
                f"{len(indptr)}, {len(slots)} and {len(scalings)}; give each segment all three."
            )
        if list(indptr) != sorted(indptr) or not indptr or indptr[0] < 0:
            raise ValueError(
                f"SegmentedLora: indptr must be row numbers that never decrease, got "
                f"{list(indptr)}; pass cumulative sums of lengths."
            )
        if any(slot is not None and slot < 0 for slot in slots):
            raise ValueError(
                f"SegmentedLora: slots must be >= 0, or None for no adapter, got {list(slots)}; "
                "pass places in the weights."
            )
        if rank < 1:
            raise ValueError(f"SegmentedLora: rank must be >= 1, got {rank}; pass the adapters' r.")
        self._backend = resolve("SegmentedLora", backend, "cpu")
        self._is_explicit = backend is not None
        self._rank = rank
        self._num_rows = indptr[-1]
        self._segments = [
            (start, stop, slot, float(scaling))
            for start, stop, slot, scaling in zip(indptr, indptr[1:], slots, scalings, strict=False)
            if slot is not None and stop > start
        ]
        self._num_slots = max((slot for _, _, slot, _ in self._segments), default=-1) + 1
        covered = sum(stop - start for start, stop, _, _ in self._segments)
        self._is_full = covered == self._num_rows

    def shrink(self, x: torch.Tensor, weights: torch.Tensor, slices: int = 1) -> torch.Tensor:
        """Multiply by lora_A.

        Args:
            x: `[T, D_in]`, rows in the order of the segments, last dim contiguous.
            weights: `[slots, >= slices * r, D_in]`, dtype of ``x``, last dim contiguous; the first
                slices * r rows of a slot are the factors of the slices, one behind the other.
            slices: modules that are stacked, e.g. 3 for q, k and v.

        Returns:
            `[T, slices * r]` in the dtype of ``x``, scaled; 0 for rows without an adapter.
        """
        width = slices * self._rank
        self._check("shrink", x, weights, (width, x.shape[-1]))
        make = x.new_empty if self._is_full else x.new_zeros
        h = make(len(x), width)
        if self._is_native(x):
            _native.module().cpu_lora_shrink(
                self._segments, _rows(x), _slots(weights), _rows(h), torch.get_num_threads()
            )
            return h
        for start, stop, slot, scaling in self._segments:
            h[start:stop] = scaling * (x[start:stop] @ weights[slot, :width].T)
        return h

    def expand_(
        self, out: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, offsets: Sequence[int]
    ) -> None:
        """Add the product with lora_B.

        Args:
            out: `[T, D_out]`, dtype of ``h``, last dim contiguous; added to in place.
            h: `[T, slices * r]` from `shrink`.
            weights: `[slots, D_out, >= r]`, dtype of ``h``, last dim contiguous.
            offsets: `[slices + 1]`, the columns of ``out``, and rows of the weights, of each slice.
        """
        self._check("expand_", h, weights, (offsets[-1], self._rank))
        slices = len(offsets) - 1
        if out.shape != (len(h), offsets[-1]) or h.shape[1] != slices * self._rank:
            raise ValueError(
                f"SegmentedLora.expand_: out must be {(len(h), offsets[-1])} and h "
                f"{(len(h), slices * self._rank)} for {slices} slices, got {tuple(out.shape)} and "
                f"{tuple(h.shape)}; pass the offsets of the stacked modules."
            )
        if out.dtype != h.dtype or out.stride(-1) != 1:
            raise ValueError(
                f"SegmentedLora.expand_: out must be {h.dtype} with stride(-1) == 1, got "
                f"{out.dtype} stride {out.stride()}; pass the base layer's output."
            )
        if self._is_native(h):
            _native.module().cpu_lora_expand(
                self._segments,
                _rows(h),
                _slots(weights),
                _rows(out),
                list(offsets),
                torch.get_num_threads(),
            )
            return
        for start, stop, slot, _ in self._segments:
            for i in range(slices):
                first, last = offsets[i : i + 2]
                own = h[start:stop, i * self._rank : (i + 1) * self._rank]
                out[start:stop, first:last] += own @ weights[slot, first:last, : self._rank].T

    def _is_native(self, tensor: torch.Tensor) -> bool:
        is_native = self._backend == "cpu"
        if is_native and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            if self._is_explicit:
                raise ValueError(
                    "SegmentedLora: tensors must be float32 on the CPU for backend='cpu', got "
                    f"{tensor.dtype} on {tensor.device}; pass backend=None."
                )
            return False
        return is_native

    def _check(
        self, what: str, rows: torch.Tensor, weights: torch.Tensor, least: tuple[int, int]
    ) -> None:
        """Raise for tensors that the native loops would read beyond."""
        if rows.ndim != 2 or len(rows) != self._num_rows:
            raise ValueError(
                f"SegmentedLora.{what}: rows must be [{self._num_rows}, ...] as indptr ends, got "
                f"{tuple(rows.shape)}; pass the batch that indptr was made for."
            )
        too_small = weights.ndim != 3 or any(
            have < need for have, need in zip(weights.shape[1:], least, strict=True)
        )
        if too_small or len(weights) < self._num_slots or weights.dtype != rows.dtype:
            raise ValueError(
                f"SegmentedLora.{what}: weights must be at least {(self._num_slots, *least)} "
                f"{rows.dtype}, "
                f"got {tuple(weights.shape)} {weights.dtype}; pass the module's whole buffer."
            )
        if rows.stride(-1) != 1 or weights.stride(-1) != 1:
            raise ValueError(
                f"SegmentedLora.{what}: the last dims must be contiguous, got strides "
                f"{rows.stride()} and {weights.stride()}; call contiguous()."
            )


def _rows(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.shape[1]


def _slots(weights: torch.Tensor) -> tuple[int, int, int]:
    return weights.data_ptr(), weights.stride(0), weights.stride(1)
