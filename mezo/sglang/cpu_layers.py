"""A model's layers on the CPU, in our batches: SGLang's plain torch forms with fewer operations.

SGLang has compiled kernels for CPUs with AMX alone. Elsewhere it calls `F.linear`, which is MKL's
product (AVX2 at most on CPUs that are not Intel's), and writes norms, rotary embeddings and
activations as chains of torch operations. The forms here are torch's, too: oneDNN's product, which
takes what the CPU has, and torch's own norm. Whatever they do not cover goes to SGLang's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from mezo.sglang.replaced import replaced


@contextmanager
def cpu_layers(runner: Any) -> Iterator[None]:
    """Let the forward inside run a fp32 model's layers through `CpuLayers`, on a CPU without AMX."""
    is_served = runner.device == "cpu" and runner.dtype == torch.float32
    if not is_served or hasattr(torch.ops.sgl_kernel, "rmsnorm_cpu"):
        yield
        return
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    layers = CpuLayers()
    with ExitStack() as stack:
        for owner, name, form in (
            (UnquantizedLinearMethod, "apply", layers.linear),
            (RMSNorm, "forward", layers.rms_norm),
            (RotaryEmbedding, "forward", layers.rotary),
            (SiluAndMul, "forward", layers.silu_and_mul),
        ):
            stack.enter_context(replaced(owner, name, _method(form, getattr(owner, name))))
        yield


def _method(form: Callable[..., Any], engines_own: Callable[..., Any]) -> Callable[..., Any]:
    """A method that tries a form and falls back to the engine's own."""

    @functools.wraps(engines_own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = form(self, *args, **kwargs)
        return engines_own(self, *args, **kwargs) if result is NotImplemented else result

    return method


class CpuLayers:
    """Forms of a model's layers, for one batch; NotImplemented for what is not theirs.

    Tensors are fp32; T is the number of tokens.

    Numerics: fp32, equal to SGLang's within rounding. A token's bits do not depend on the other
    tokens of a batch of two or more (tests/sglang/test_cpu_layers.py).
    """

    def __init__(self) -> None:
        # The positions of a batch and a rotary embedding's tables for them, `[T, 1, D / 2]` each.
        self._angles: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def linear(
        self, _: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[T, D_in]` -> `[T, D_out]`."""
        weight = layer.weight
        if x.ndim != 2 or x.dtype != torch.float32 or weight.dtype != torch.float32:
            return NotImplemented
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product

    def rms_norm(
        self, norm: Any, x: torch.Tensor, residual: torch.Tensor | None = None, *rest: Any, **more: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`[..., D]` -> normed; with a residual it is added first and the sum returned, too."""
        is_more = any(value is not None for value in (*rest, *more.values()))
        if is_more or norm.variance_size_override is not None or x.dtype != torch.float32:
            return NotImplemented
        if x.shape[-1] != norm.hidden_size:
            return NotImplemented
        summed = x if residual is None else x + residual
        normed = F.rms_norm(summed, (norm.hidden_size,), norm.weight, norm.variance_epsilon)
        return normed if residual is None else (normed, summed)

    def rotary(
        self, rotary: Any, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, H * D]` queries and keys -> turned by their positions."""
        is_more = any(value is not None for value in (*rest, *more.values()))
        if is_more or not _is_plain_rotary(type(rotary)) or not rotary.is_neox_style:
            return NotImplemented
        if rotary.rotary_dim != rotary.head_size or q.dtype != torch.float32:
            return NotImplemented
        cos, sin = self._tables(rotary.cos_sin_cache, positions)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    def _tables(
        self, cache: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions; all layers of a forward ask for the same."""
        known = self._angles
        if known is None or known[0] is not cache or known[1] is not positions:
            cos, sin = cache.index_select(0, positions.flatten()).float().unsqueeze(1).chunk(2, -1)
            known = self._angles = (cache, positions, cos.contiguous(), sin.contiguous())
        return known[2], known[3]

    def silu_and_mul(self, _: Any, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        """`[T, 2 * D]` -> silu of the first half times the second."""
        if rest or more or x.dtype != torch.float32:
            return NotImplemented
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The halves of every head as the coordinates of points that are turned."""
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    heads, turned = (t.view(len(x), -1, 2 * half) for t in (x, out))
    first, second = heads[..., :half], heads[..., half:]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return out


@functools.cache
def _is_plain_rotary(kind: type) -> bool:
    """Whether a class turns as `RotaryEmbedding` itself does, whatever its angles."""
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    return kind.forward_native is RotaryEmbedding.forward_native  # type: ignore[attr-defined]
