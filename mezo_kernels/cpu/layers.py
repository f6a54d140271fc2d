"""Layers of a decoder between its products, for hosts without a GPU: fp32 rows, one pass each.

Engines have fused kernels for these on a GPU; on a CPU theirs are chains of torch operations. On
tensors of other devices the functions here are such chains, too.
"""

from typing import NoReturn

import torch
import torch.nn.functional as F

from mezo_kernels import _native
from mezo_kernels.backends import CPU_NATIVE, REFERENCE, register, resolve

register(
    "rms_norm",
    "rotary",
    "silu_and_mul",
    needs={"reference": REFERENCE, "cpu": CPU_NATIVE},
    follows_environment=False,
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual and normalise by the root of the mean square.

        summed = x + residual,   normed = summed / sqrt(mean(summed ** 2) + eps) * weight

    Args:
        x: `[T, D]` fp32, last dim contiguous.
        weight: `[D]` fp32, contiguous.
        eps: added to the mean square.
        residual: `[T, D]` fp32, last dim contiguous; None adds nothing.
        backend: "reference" | "cpu" | None (cpu for CPU tensors where the native module is built).

    Returns:
        (normed, summed), `[T, D]` fp32 each; ``summed`` is ``x`` where there is no residual.

    Raises:
        ValueError: another rank, shape, dtype or stride.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: fp32; cpu: 16 running sums and a tree over them, the same bits on every instruction
    set, for every number of threads, and for a row whatever the other rows are.
    Graph-safe: no. Cost: every tensor is touched once, ``summed`` twice.
    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    rows, width = _rows("rms_norm", "x", x)
    if weight.shape != (width,) or weight.dtype != torch.float32 or weight.stride(0) != 1:
        _refuse("rms_norm", "weight", f"contiguous [{width}] torch.float32", weight)
    if residual is not None and _rows("rms_norm", "residual", residual) != (rows, width):
        _refuse("rms_norm", "residual", f"[{rows}, {width}]", residual)
    if not _is_native("rms_norm", backend, x):
        summed = x if residual is None else x + residual
        return F.rms_norm(summed, (width,), weight, eps), summed
    normed = torch.empty(rows, width)
    summed = x if residual is None else torch.empty(rows, width)
    _native.module().cpu_rms_norm(
        (x.data_ptr(), x.stride(0)),
        (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0)),
        weight.data_ptr(),
        eps,
        width,
        summed.data_ptr(),
        normed.data_ptr(),
        rows,
        torch.get_num_threads(),
    )
    return normed, summed


def rotary(
    x: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Turn the halves of each head, as coordinates of points, by angles of the row's position.

        (a, b) -> (a cos - b sin, b cos + a sin)

    Args:
        x: `[T, H * D]` fp32, last dim contiguous; D is the width of ``cos_sin``.
        cos_sin: `[P, D]` fp32, last dim contiguous: D / 2 cosines, then D / 2 sines, by position.
        positions: `[T]` int64, contiguous, rows of ``cos_sin``.
        backend: "reference" | "cpu" | None (cpu for CPU tensors where the native module is built).

    Returns:
        `[T, H * D]` fp32.

    Raises:
        ValueError: another rank, shape, dtype or stride.
        IndexError: a position outside of ``cos_sin``.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: fp32; cpu: one rounded product and one fma per element, bits as in `rms_norm`.
    Graph-safe: no. Cost: every tensor is touched once.
    Source: Su et al. 2021 (arXiv 2104.09864), in the layout of GPT-NeoX.
    """
    rows, width = _rows("rotary", "x", x)
    _, dim = _rows("rotary", "cos_sin", cos_sin)
    if dim == 0 or dim % 2 or width % dim:
        _refuse("rotary", "cos_sin", f"[P, D] with D even and a divisor of {width}", cos_sin)
    is_plain = positions.is_contiguous() and positions.dtype == torch.int64
    if positions.shape != (rows,) or not is_plain:
        _refuse("rotary", "positions", f"contiguous [{rows}] torch.int64", positions)
    if not _is_native("rotary", backend, x):
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
        a, b = x.view(rows, -1, dim).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).view(rows, width)
    out = torch.empty(rows, width)
    _native.module().cpu_rotary(
        (x.data_ptr(), x.stride(0)),
        width // dim,
        dim,
        positions.data_ptr(),
        (cos_sin.data_ptr(), cos_sin.stride(0), len(cos_sin)),
        out.data_ptr(),
        rows,
        torch.get_num_threads(),
    )
    return out


def silu_and_mul(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Gate the second half of each row by the first.

        (a, b) -> a / (1 + exp(-a)) * b

    Args:
        x: `[T, 2 * D]` fp32, last dim contiguous.
        backend: "reference" | "cpu" | None (cpu for CPU tensors where the native module is built).

    Returns:
        `[T, D]` fp32.

    Raises:
        ValueError: another rank, shape, dtype or stride.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: fp32; cpu: exp to 1 ulp, and 0 below -87; bits as in `rms_norm`.
    Graph-safe: no. Cost: every tensor is touched once.
    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    rows, width = _rows("silu_and_mul", "x", x)
    if width % 2:
        _refuse("silu_and_mul", "x", "[T, 2 * D]", x)
    if not _is_native("silu_and_mul", backend, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    out = torch.empty(rows, width // 2)
    _native.module().cpu_silu_and_mul(
        (x.data_ptr(), x.stride(0)), width // 2, out.data_ptr(), rows, torch.get_num_threads()
    )
    return out


def _rows(function: str, name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """The shape of a tensor of rows."""
    if tensor.ndim != 2 or tensor.dtype != torch.float32 or tensor.stride(1) != 1:
        _refuse(function, name, "[rows, columns] torch.float32 with stride(-1) == 1", tensor)
    rows, width = tensor.shape
    return rows, width


def _is_native(function: str, backend: str | None, x: torch.Tensor) -> bool:
    return resolve(function, backend, x.device.type) == "cpu"


def _refuse(function: str, name: str, expected: str, tensor: torch.Tensor) -> NoReturn:
    raise ValueError(
        f"{function}: {name} must be {expected}, got {tuple(tensor.shape)} {tensor.dtype} stride "
        f"{tensor.stride()}; pass fp32 rows of one layer."
    )
