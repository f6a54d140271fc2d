"""Write golden_z.json, the bits of z that freeze the format.

    python tests/kernels/directions/kat/make_golden.py

The reference backend makes them. Running this again must change nothing; if it does, every stored
trajectory is broken: raise the trajectory format version and add a Numerics line to the CHANGELOG.
"""

import hashlib
import itertools
import json
from pathlib import Path

import torch

import mezo_kernels as mk

PATH = Path(__file__).with_name("golden_z.json")
DIGEST_SHAPE = (2048, 1024)

# Names give uids; offsets reach the last elements below 2**34 and groups cut by a shard's edge.
TENSORS = [
    mk.TensorSpec("model.layers.0.self_attn.q_proj.lora_A", (2, 6)),
    mk.TensorSpec("model.layers.3.self_attn.q_proj.lora_B", (4, 3), 11, 5, (64, 8)),
    mk.TensorSpec("model.layers.31.mlp.down_proj.lora_A", (2, 6), 2**20 - 2, 0, (2**20, 6)),
    mk.TensorSpec("far", (3, 4), 2**17 - 3, 2**17 - 5, (2**17, 2**17 - 1)),
]
KEYS = [(0, 0, 0), (1, 1, 0), (2**64 - 1, 2**32 - 1, 2**24 - 1), (0x0123456789ABCDEF, 20000, 7)]


def bits_of(z: torch.Tensor) -> list[str]:
    return [f"{value & 0xFFFFFFFF:08x}" for value in z.reshape(-1).view(torch.int32).tolist()]


def digest_of(z: torch.Tensor) -> str:
    return hashlib.blake2s(z.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def make(backend: str) -> dict:
    entries, digests = [], []
    for distribution in ("gaussian", "rademacher"):
        for (seed, step, index), spec in itertools.product(KEYS, TENSORS):
            direction = mk.Direction(seed, step, index, distribution)
            z = mk.sample(spec, direction, backend=backend)
            entries.append(
                {
                    "seed": seed,
                    "step": step,
                    "index": index,
                    "distribution": distribution,
                    "name": spec.name,
                    "uid": f"{spec.uid:08x}",
                    "shape": spec.shape,
                    "offset": (spec.row0, spec.col0),
                    "global_shape": spec.global_shape,
                    "bits": " ".join(bits_of(z)),
                }
            )
        direction = mk.Direction(42, 7, 1, distribution)
        z = mk.sample(mk.TensorSpec("digest", DIGEST_SHAPE), direction, backend=backend)
        digests.append({"distribution": distribution, "blake2s": digest_of(z)})
    return {
        "made_by": "tests/kernels/directions/kat/make_golden.py",
        "entries": entries,
        "digests": digests,
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(make("reference"), indent=1) + "\n")
