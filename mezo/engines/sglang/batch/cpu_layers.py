"""A model's layers on the CPU, in our batches: not SGLang's chains of operations.

SGLang has compiled kernels for CPUs with AMX alone. Elsewhere it calls `F.linear`, which is MKL's
product (AVX2 at most on CPUs that are not Intel's), and writes norms, rotary embeddings and
activations as chains of torch operations. Here the product is oneDNN's, which uses what the CPU
has, and the rest is `mezo_kernels.cpu`. Whatever these do not cover goes to SGLang's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mezo.engines.sglang.batch.patch import replaced
from mezo_kernels import cpu as layers


@contextmanager
def cpu_layers(runner: Any) -> Iterator[None]:
    """Let the forward inside run a fp32 model's layers on a CPU without AMX as `CpuLayers` does."""
    from sglang.srt.utils import cpu_has_amx_support

    if runner.device != "cpu" or runner.dtype != torch.float32 or cpu_has_amx_support():
        yield
        return
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    with ExitStack() as stack:
        if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
            linear = _first(CpuLayers.linear, UnquantizedLinearMethod.apply)
            stack.enter_context(replaced(UnquantizedLinearMethod, "apply", linear))
        for kind, form in (
            (RMSNorm, CpuLayers.rms_norm),
            (RotaryEmbedding, CpuLayers.rotary),
            (SiluAndMul, CpuLayers.silu_and_mul),
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
    """Forms of a model's layers; None for what they do not cover.

    Tensors are fp32; T is the number of tokens.

    Numerics: fp32, equal to SGLang's within rounding. A token's bits do not depend on the other
    tokens of a batch of two or more.
    """

    @staticmethod
    def linear(
        method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """`[T, D_in]` -> `[T, D_out]`."""
        if x.ndim != 2 or x.dtype != torch.float32 or layer.weight.dtype != torch.float32:
            return None
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, layer.weight, bias, "none", [], ""
        )
        return out

    @staticmethod
    def rms_norm(
        norm: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """`[T, D]` -> normed; a residual is added before that, and the sum returned, too."""
        weight = norm.weight
        if norm.variance_size_override is not None or _are_any(more, named):
            return None
        if not _are_rows(x) or weight.dtype != torch.float32:
            return None
        if residual is not None and not _are_rows(residual):
            return None
        normed, summed = layers.rms_norm(x, weight, norm.variance_epsilon, residual)
        return normed if residual is None else (normed, summed)

    @staticmethod
    def rotary(
        rotary: Any,
        positions: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`[T, H * D]` queries and keys -> turned by their positions."""
        cos_sin = rotary.cos_sin_cache
        is_covered = rotary.is_neox_style and rotary.rotary_dim == rotary.head_size
        are_plain = positions.ndim == 1 and positions.dtype == torch.int64
        if not is_covered or not are_plain or _are_any(more, named):
            return None
        if not (_are_rows(q) and _are_rows(k) and _are_rows(cos_sin)):
            return None
        return layers.rotary(q, cos_sin, positions), layers.rotary(k, cos_sin, positions)

    @staticmethod
    def silu_and_mul(op: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor | None:
        """`[T, 2 * D]` -> silu of the first half times the second."""
        return layers.silu_and_mul(x) if _are_rows(x) and not _are_any(more, named) else None


def _are_any(more: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether an argument is given that the forms do not know."""
    return any(value is not None for value in (*more, *named.values()))


def _are_rows(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.dtype == torch.float32 and tensor.stride(1) == 1
