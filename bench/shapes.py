"""Named sets of LoRA tensors."""

from dataclasses import dataclass

import mezo_kernels as mk


@dataclass(frozen=True)
class Model:
    """Widths of a decoder layer, and whether its feed-forward is gated (three linears) or not."""

    layers: int
    hidden: int
    ffn: int
    q: int
    kv: int
    is_gated: bool = True

    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (d_in, d_out)} of one layer."""
        attention = {
            "self_attn.q_proj": (self.hidden, self.q),
            "self_attn.k_proj": (self.hidden, self.kv),
            "self_attn.v_proj": (self.hidden, self.kv),
        }
        if not self.is_gated:
            return attention | {
                "self_attn.out_proj": (self.q, self.hidden),
                "fc1": (self.hidden, self.ffn),
                "fc2": (self.ffn, self.hidden),
            }
        return attention | {
            "self_attn.o_proj": (self.q, self.hidden),
            "mlp.gate_proj": (self.hidden, self.ffn),
            "mlp.up_proj": (self.hidden, self.ffn),
            "mlp.down_proj": (self.ffn, self.hidden),
        }


MODELS = {
    "smollm2-135m": Model(30, 576, 1536, 576, 192),
    "opt-1.3b": Model(24, 2048, 8192, 2048, 2048, is_gated=False),
    "opt-13b": Model(40, 5120, 20480, 5120, 5120, is_gated=False),
    "llama-3.1-8b": Model(32, 4096, 14336, 4096, 1024),
    "qwen3-32b": Model(64, 5120, 25600, 8192, 1024),
}
TARGETS = {"qv": ("self_attn.q_proj", "self_attn.v_proj"), "all-linear": None}
FLAT = "flat-100m"


def lora_specs(model: str, rank: int = 8, targets: str = "all-linear") -> list[mk.TensorSpec]:
    """The A [r, d_in] and B [d_out, r] of the targeted linears of every layer.

    ``flat-100m`` is one tensor of 100 M elements, whatever the rank.
    """
    if model == FLAT:
        return [mk.TensorSpec("flat", (50_000, 2_000))]
    wanted = TARGETS[targets]
    return [
        mk.TensorSpec(f"model.layers.{layer}.{name}.lora_{factor}", shape)
        for layer in range(MODELS[model].layers)
        for name, (d_in, d_out) in MODELS[model].linears().items()
        if wanted is None or name in wanted
        for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank)))
    ]
