"""A model's layers on the CPU, in our batches: not SGLang's chains of operations.

SGLang has compiled kernels only for CPUs with AMX. Elsewhere it calls `F.linear`, which is MKL's
product (AVX2 at most on CPUs that are not Intel's), and writes norms, rotary embeddings and
activations as chains of torch operations. Here the product is oneDNN's, which uses what the CPU
has, and the rest is `mezo_kernels.layers`. Whatever these do not cover goes to SGLang's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch

from mezo.engines.sglang.batch.patch import patched
from mezo_kernels import layers

if TYPE_CHECKING:
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding
    from sglang.srt.model_executor.model_runner import ModelRunner

P = ParamSpec("P")
T = TypeVar("T")
Layer = TypeVar("Layer")


@contextmanager
def cpu_layers(runner: ModelRunner) -> Iterator[None]:
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
            stack.enter_context(patched(UnquantizedLinearMethod, "apply", linear))
        for kind, ours in (
            (RMSNorm, CpuLayers.rms_norm),
            (RotaryEmbedding, CpuLayers.rotary),
            (SiluAndMul, CpuLayers.silu_and_mul),
        ):
            method = _first(ours, kind.forward, reference=kind.forward_native)
            stack.enter_context(patched(kind, "forward", method))
        yield


def _first(
    ours: Callable[Concatenate[Layer, P], T | None],
    engines_own: Callable[Concatenate[Layer, P], T],
    *,
    reference: object = None,
) -> Callable[Concatenate[Layer, P], T]:
    """A method that tries ours before the engine's own.

    Args:
        ours: returns None for what it does not cover.
        engines_own: the method that runs then.
        reference: the class's definition of the operation; a subclass with another runs its own.
    """

    @functools.wraps(engines_own)
    def method(self: Layer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if reference is None or getattr(type(self), "forward_native", None) is reference:
            result = ours(self, *args, **kwargs)
            if result is not None:
                return result
        return engines_own(self, *args, **kwargs)

    return method


class CpuLayers:
    """Operations of a model's layers; they return None for what they do not cover.

    Tensors are fp32; T is the number of tokens.

    Numerics: fp32, equal to SGLang's within rounding. A token's bits do not depend on the other
    tokens of a batch of two or more.
    """

    @staticmethod
    def linear(
        method: UnquantizedLinearMethod,
        layer: LinearBase,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
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
        norm: RMSNorm,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *more: object,
        **named: object,
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
        rotary: RotaryEmbedding,
        positions: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        *more: object,
        **named: object,
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
    def silu_and_mul(
        op: SiluAndMul, x: torch.Tensor, *more: object, **named: object
    ) -> torch.Tensor | None:
        """`[T, 2 * D]` -> silu of the first half times the second."""
        return layers.silu_and_mul(x) if _are_rows(x) and not _are_any(more, named) else None


def _are_any(more: tuple[object, ...], named: dict[str, object]) -> bool:
    """Whether an argument is given that ours do not know."""
    return any(value is not None for value in (*more, *named.values()))


def _are_rows(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.dtype == torch.float32 and tensor.stride(1) == 1
