"""The tensors of one call, checked."""

from dataclasses import dataclass

import torch

from mezo_kernels.attention.plan import SharedPrefixPlan

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FUNCTION = "shared_prefix_attention"
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, suffix and cache of one layer, with the plan that says how they belong together.

    What a backend of `shared_prefix_attention` gets; the fields are its arguments.
    """

    q: torch.Tensor  # [T, H, D]
    k_suffix: torch.Tensor  # [T, H_kv, D]
    v_suffix: torch.Tensor  # [T, H_kv, D_v]
    k_cache: torch.Tensor  # [slots, H_kv, D]
    v_cache: torch.Tensor  # [slots, H_kv, D_v]
    plan: SharedPrefixPlan
    scale: float
    soft_cap: float

    @property
    def num_kv_heads(self) -> int:
        """H_kv."""
        return self.k_suffix.shape[1]

    @property
    def heads_per_kv_head(self) -> int:
        """H / H_kv."""
        return self.q.shape[1] // self.num_kv_heads

    def check(self, *, takes_fp64: bool) -> None:
        """Raise for tensors that do not belong together; nothing is read."""
        self._check_shapes()
        tensors = self._named()
        dtypes = (*_DTYPES, torch.float64) if takes_fp64 else _DTYPES
        for name, tensor in tensors.items():
            if tensor.dtype not in dtypes or tensor.dtype != self.q.dtype:
                raise ValueError(
                    f"{_FUNCTION}: {name} must have the dtype of q, one of "
                    f"{[str(d) for d in dtypes]}, got {tensor.dtype} with q {self.q.dtype}; "
                    "convert it, or keep the cache in the model's dtype."
                )
            if tensor.device != self.q.device:
                raise ValueError(
                    f"{_FUNCTION}: {name} must be on {self.q.device} like q, got {tensor.device}; "
                    "attend where the cache lies."
                )
            if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
                raise ValueError(
                    f"{_FUNCTION}: {name} must have stride(-1) == 1, got shape "
                    f"{tuple(tensor.shape)} stride {tensor.stride()}; pass the row-major view."
                )
        if self.soft_cap < 0:
            raise ValueError(
                f"{_FUNCTION}: soft_cap must be >= 0, got {self.soft_cap}; pass 0 for no cap."
            )

    def _named(self) -> dict[str, torch.Tensor]:
        return {
            "q": self.q,
            "k_suffix": self.k_suffix,
            "v_suffix": self.v_suffix,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
        }

    def _check_shapes(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self._named().items()}
        if any(len(shape) != 3 for shape in shapes.values()):
            raise ValueError(
                f"{_FUNCTION}: all tensors must have 3 dimensions, tokens or slots, heads, head "
                f"dim, got {shapes}; split the heads with view(-1, heads, head_dim)."
            )
        tokens, heads, dim = shapes["q"]
        _, kv_heads, v_dim = shapes["v_suffix"]
        expected = {
            "q": (self.plan.num_tokens, heads, dim),
            "k_suffix": (tokens, kv_heads, dim),
            "v_suffix": (tokens, kv_heads, v_dim),
            "k_cache": (shapes["k_cache"][0], kv_heads, dim),
            "v_cache": (shapes["k_cache"][0], kv_heads, v_dim),
        }
        for name, shape in shapes.items():
            if shape != expected[name]:
                raise ValueError(
                    f"{_FUNCTION}: {name} must be {expected[name]} by the plan's tokens, q and "
                    f"v_suffix, got {shape}; pass the tensors of one layer and its plan."
                )
        if not kv_heads or heads % kv_heads:
            raise ValueError(
                f"{_FUNCTION}: the heads of q must be a multiple of the KV heads, got {heads} and "
                f"{kv_heads}; pass whole groups of heads to each rank."
            )
        if not 1 <= dim <= MAX_HEAD_DIM or not 1 <= v_dim <= MAX_HEAD_DIM:
            raise NotImplementedError(
                f"{_FUNCTION}: head dims must be 1 to {MAX_HEAD_DIM}, got {dim} and {v_dim}; "
                "use the engine's own attention for larger ones."
            )
