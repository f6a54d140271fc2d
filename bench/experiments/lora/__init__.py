"""LoRA products of perturbed factors, without the perturbed factors in memory.

It stays here until it wins a shape of `python -m bench.experiments.lora.measure` over slots that
`perturb_into` writes.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch

from bench.experiments.lora.call import LoraCall
from mezo_kernels.backends import EVERY_BACKEND, load, register, resolve
from mezo_kernels.directions import rounded_factors
from mezo_kernels.directions.philox import Direction, TensorSpec
from mezo_kernels.directions.plan import DTYPE_CODES


class _Backend(Protocol):
    def perturbed_lora(self, call: LoraCall) -> None: ...


register(
    "perturbed_lora",
    needs=EVERY_BACKEND,
    package=__name__,
)


def perturbed_lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_spec: TensorSpec,
    b_spec: TensorSpec,
    directions: Sequence[Direction],
    scales: Sequence[float],
    *,
    row_indptr: Sequence[int],
    scaling: float = 1.0,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Apply a LoRA adapter under several perturbations, each to its own rows.

        A_k = round(fma(scale_k, z(a_spec, direction_k), a)),  B_k likewise
        h[t] = round(A_k x[t]),   y[t] = round(scaling * B_k h[t] + out[t])
                                          for the rows t of copy k and all copies k

    The perturbed factors have the bits that `perturb_into` writes to slots of the dtype of ``x``.
    On a GPU they exist in registers only: z is made inside of the products.

    Args:
        x: `[T, D_in]` fp32 | fp16 | bf16, the inputs, sorted by copy; last dim contiguous.
        a: `[R, D_in]` fp32, the master of lora_A, or a shard of it; last dim contiguous.
        b: `[D_out, R]` fp32, the master of lora_B, or a shard of it; last dim contiguous.
        a_spec: the logical place of ``a``.
        b_spec: the logical place of ``b``.
        directions: K `Direction`, one a copy; one named several times is made once for each two
            of its copies.
        scales: K finite floats, rounded to fp32 once, e.g. (+eps, -eps); 0 uses the master as it
            is, rounded.
        row_indptr: K + 1 ints from 0 to T: copy k has the rows row_indptr[k] to row_indptr[k + 1];
            copies without rows are fine.
        scaling: the adapter's factor, alpha / R.
        out: `[T, D_out]` in the dtype of ``x``, the base layer's output, or None for zeros.
        backend: "reference" | "cpu" | "triton" | "cuda" | None (the best one for the device).

    Returns:
        ``out``, changed in place and unseen by autograd, or else a new `[T, D_out]` in the dtype of
        ``x``.

    Raises:
        ValueError: a wrong rank, shape, dtype, stride or device, lengths that do not match, a scale
            that is not finite in fp32, or an unknown backend name.
        NotImplementedError: backend "cuda" with fp32, a rank other than 8, 16, 32 and 64, or
            shapes, strides or shards that are not multiples of 8; "triton" supports all of these.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: products accumulated in fp32, in parts of D_in that are added in their order; h is
    rounded to the dtype of ``x``, as SGLang's LoRA kernels do; scaling and the sum with ``out`` in
    fp32, one rounding. fp32 products are IEEE. Deterministic. On triton and cuda the order of a
    row's sums follows from D_in, D_out, R, specs and dtype: it does not depend on the rows beside
    it or on their number, so rows of one content under one scale get the same bits. reference and
    cpu multiply with BLAS, which does not promise that. Backends agree within rounding, the factors
    in bits.
    Graph-safe: no, each call sends its scalars; what it launches is (`LoraCall.on_device`).
    Cost: three launches on a GPU; [D_in / 512, T, R] fp32 on cuda ([D_in / 256, T, R] on triton)
    are written and read in between. triton makes z anew for each 32 or 64 rows of a copy, cuda for
    each share of the rows, as many as fill the device. reference and cpu write the factors to
    memory.
    Source: Hu et al. 2021 (arXiv 2106.09685) for LoRA; Malladi et al. 2023 (arXiv 2305.17333).
    """
    function = "perturbed_lora"
    name = resolve(function, backend, x.device.type)
    _check_tensors(function, x, a, b, out)
    _check_spec(function, "a_spec", a, a_spec)
    _check_spec(function, "b_spec", b, b_spec)
    factors = rounded_factors(function, "directions", "scales", directions, scales)
    indptr = _checked_indptr(function, row_indptr, len(factors), len(x))
    y = x.new_empty(len(x), len(b)) if out is None else out.detach()
    call = LoraCall(
        x.detach(),
        a.detach(),
        b.detach(),
        a_spec,
        b_spec,
        tuple(directions),
        tuple(factors),
        indptr,
        float(scaling),
        y,
        is_added=out is not None,
    )
    if not a.numel() or not y.numel():
        # Empty sums.
        return y.zero_() if out is None else out
    module = load(function, name)
    cast(_Backend, module).perturbed_lora(call)
    return y if out is None else out


def _check_tensors(
    function: str, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None
) -> None:
    shapes = [tuple(tensor.shape) for tensor in (x, a, b)]
    is_matrix = all(len(shape) == 2 for shape in shapes)
    if not is_matrix or x.shape[1] != a.shape[1] or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{function}: x, a and b must be [T, D_in], [R, D_in] and [D_out, R], got {shapes[0]}, "
            f"{shapes[1]} and {shapes[2]}; pass tokens as rows and the factors as PEFT stores them."
        )
    if x.dtype not in DTYPE_CODES:
        raise ValueError(
            f"{function}: x must be one of {[str(d) for d in DTYPE_CODES]}, got {x.dtype}; pass "
            "the activations of the model."
        )
    for what, factor in (("a", a), ("b", b)):
        if factor.dtype != torch.float32:
            raise ValueError(
                f"{function}: {what} must be torch.float32, got {factor.dtype}; pass the master "
                "that the slots are written from."
            )
    if out is not None and (out.shape != (len(x), len(b)) or out.dtype != x.dtype):
        raise ValueError(
            f"{function}: out must be [T, D_out] in the dtype of x, {(len(x), len(b))} {x.dtype}, "
            f"got {tuple(out.shape)} {out.dtype}; pass the base layer's output."
        )
    for what, tensor in (("x", x), ("a", a), ("b", b), ("out", out)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(
                f"{function}: {what} must be on {x.device} like x, got {tensor.device}; keep the "
                "masters where the model is."
            )
        rows, cols = tensor.shape
        if (cols > 1 and tensor.stride(1) != 1) or (rows > 1 and tensor.stride(0) < cols):
            raise ValueError(
                f"{function}: {what} must have stride(-1) == 1 and rows that do not overlap, got "
                f"shape {tuple(tensor.shape)} stride {tensor.stride()}; pass it row-major."
            )


def _check_spec(function: str, what: str, factor: torch.Tensor, spec: TensorSpec) -> None:
    if tuple(factor.shape) != spec.shape:
        raise ValueError(
            f"{function}: {what} must have the shape of its tensor, {tuple(factor.shape)}, got "
            f"{spec.shape} of {spec.name}; pass the TensorSpec of this shard."
        )


def _checked_indptr(
    function: str, row_indptr: Sequence[int], num_copies: int, num_rows: int
) -> tuple[int, ...]:
    indptr = tuple(int(end) for end in row_indptr)
    if len(indptr) != num_copies + 1 or indptr[0] != 0 or indptr[-1] != num_rows:
        raise ValueError(
            f"{function}: row_indptr must be {num_copies + 1} ints from 0 to {num_rows}, one range "
            f"for each direction, got {len(indptr)} from {indptr[:1]} to {indptr[-1:]}; sort the "
            "rows by copy and pass where each copy begins, and the end."
        )
    if list(indptr) != sorted(indptr):
        raise ValueError(
            f"{function}: row_indptr must not decrease, got {indptr}; sort the rows by copy."
        )
    return indptr
