"""Named sets of LoRA tensors."""

import mezo_kernels as mk

# Layers, hidden, feed-forward, query and key-value widths.
MODELS = {"smollm2-135m": (30, 576, 1536, 576, 192)}


def lora_specs(model: str, rank: int = 8) -> list[mk.TensorSpec]:
    """The A [r, d_in] and B [d_out, r] of all seven linears of every layer."""
    layers, hidden, ffn, q, kv = MODELS[model]
    linears = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, ffn),
        "mlp.up_proj": (hidden, ffn),
        "mlp.down_proj": (ffn, hidden),
    }
    return [
        mk.TensorSpec(f"model.layers.{layer}.{name}.lora_{factor}", shape)
        for layer in range(layers)
        for name, (d_in, d_out) in linears.items()
        for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank)))
    ]
