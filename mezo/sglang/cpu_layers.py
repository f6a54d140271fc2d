"""A model's layers on the CPU, in our batches: SGLang's plain torch forms with fewer operations.

SGLang has compiled kernels for CPUs with AMX alone. Elsewhere it calls `F.linear`, which is MKL's
product (AVX2 at most on CPUs that are not Intel's), and writes norms, rotary embeddings and
activations as chains of torch operations. The forms here are torch's, too: oneDNN's product, which
uses what the CPU has, and torch's own norm. Whatever they do not cover goes to SGLang's.
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
    """Let the forward inside run a fp32 model's layers on a CPU without AMX as `CpuLayers` does."""
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding
    from sglang.srt.utils import cpu_has_amx_support

    if runner.device != "cpu" or runner.dtype != torch.float32 or cpu_has_amx_support():
        yield
        return
    layers = CpuLayers()
    linear = UnquantizedLinearMethod.apply
    with ExitStack() as stack:
        stack.enter_context(
            replaced(UnquantizedLinearMethod, "apply", _first(layers.linear, linear))
        )
        for kind, form in (
            (RMSNorm, layers.rms_norm),
            (RotaryEmbedding, layers.rotary),
            (SiluAndMul, layers.silu_and_mul),
        ):
            method = _first(form, kind.forward, truth=kind.forward_native)
            stack.enter_context(replaced(kind, "forward", method))
        yield


def _first(
    form: Callable[..., Any], engines_own: Callable[..., Any], *, truth: Any = None
) -> Callable[..., Any]:
    """A method that tries a form before the engine's own.

    Args:
        form: returns None for what is not its own.
        engines_own: the method that it stands before.
        truth: the class's definition of the operation; subclasses with another are passed over.
    """

    @functools.wraps(engines_own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if truth is None or type(self).forward_native is truth:
            result = form(self, *args, **kwargs)
            if result is not None:
                return result
        return engines_own(self, *args, **kwargs)

    return method


class CpuLayers:
    """Forms of a model's layers, for one batch; None for what they do not cover.

    Tensors are fp32; T is the number of tokens.

    Numerics: fp32, equal to SGLang's within rounding. A token's bits do not depend on the other
    tokens of a batch of two or more.
    """

    def __init__(self) -> None:
        # A cache of angles, positions, and the cosines and sines for them.
        self._turns: tuple[torch.Tensor, ...] | None = None

    def linear(
        self, method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """`[T, D_in]` -> `[T, D_out]`."""
        if x.ndim != 2 or x.dtype != torch.float32 or layer.weight.dtype != torch.float32:
            return None
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, layer.weight, bias, "none", [], ""
        )
        return out

    def rms_norm(
        self,
        norm: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """`[..., D]` -> normed; a residual is added before that, and the sum returned, too."""
        is_covered = x.dtype == norm.weight.dtype == torch.float32 and not _are_any(more, named)
        if not is_covered or norm.variance_size_override is not None:
            return None
        summed = x if residual is None else x + residual
        normed = F.rms_norm(summed, (norm.hidden_size,), norm.weight, norm.variance_epsilon)
        return normed if residual is None else (normed, summed)

    def rotary(
        self,
        rotary: Any,
        positions: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`[T, H * D]` queries and keys -> turned by their positions."""
        is_covered = q.dtype == k.dtype == torch.float32 and not _are_any(more, named)
        if not is_covered or not rotary.is_neox_style or rotary.rotary_dim != rotary.head_size:
            return None
        cos, sin = self._turns_of(rotary.cos_sin_cache, positions)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    def _turns_of(
        self, cache: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, 1, D / 2]` cosines and sines; the layers of a forward mostly ask for the same."""
        known = self._turns
        if known is None or known[0] is not cache or known[1] is not positions:
            cos, sin = cache.index_select(0, positions.flatten()).float().unsqueeze(1).chunk(2, -1)
            known = self._turns = (cache, positions, cos.contiguous(), sin.contiguous())
        return known[2], known[3]

    def silu_and_mul(
        self, op: Any, x: torch.Tensor, *more: Any, **named: Any
    ) -> torch.Tensor | None:
        """`[T, 2 * D]` -> silu of the first half times the second."""
        if x.dtype != torch.float32 or _are_any(more, named):
            return None
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def _are_any(more: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether an argument is given that the forms do not know."""
    return any(value is not None for value in (*more, *named.values()))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the points whose coordinates are the halves of each head."""
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    heads, turned = (t.view(len(x), -1, 2 * half) for t in (x, out))
    first, second = heads[..., :half], heads[..., half:]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return out
