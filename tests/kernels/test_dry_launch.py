"""What the launching code asks of a GPU: every launch compiles and fits, without spills."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import mezo_kernels as mk
from tests.support import direction_cases
from tests.support.dry_launch import check_launches, dry_launches
from tests.support.shared_prefix import random_batch, shuffle_rows

pytestmark = pytest.mark.slow

# Prefixes of none, one, some, several parts; empty rows and groups; more rows than a tile holds.
GROUPS = [(0, (3, 1, 4)), (1, (2, 2)), (33, (5, 0, 2)), (1500, (20, 3)), (7, ()), (9, (1,) * 64)]
# (heads, KV heads, head dim, of values): SmolLM2, OPT, Llama, Gemma, Phi and an uneven one.
SHAPES = [
    (9, 3, 64, 64),
    (2, 2, 80, 80),
    (8, 1, 128, 128),
    (4, 1, 256, 256),
    (6, 2, 96, 96),
    (6, 2, 96, 64),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Work blocks of other sizes than the plan's only matter for bits.
DIRECTION_CASES = [n for n in direction_cases.CASES if not n.startswith("other_block_sizes")]


@pytest.mark.parametrize(
    ("arch", "prefix"), [(90, ""), (80, "perturb_into_a_pool"), (80, "perturb_pair")]
)
def test_direction_calls(arch, prefix):
    for name in DIRECTION_CASES:
        if name.startswith(prefix):
            with dry_launches(arch) as launches:
                direction_cases.CASES[name]("triton", "cpu")
            check_launches(launches, arch, {launch.kernel.name for launch in launches})
            assert launches or "empty" in name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(dtype, shape):
    heads, kv_heads, dim, v_dim = shape
    batch = random_batch(
        GROUPS, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim, dtype=dtype, seed=3
    )
    shuffled, plan, _ = shuffle_rows(batch, 3)
    for arch in (90, 80) if dtype == torch.bfloat16 else (90,):
        with dry_launches(arch) as launches:
            batch.attend(backend="triton", return_lse=True, soft_cap=30.0)
            shuffled.attend(backend="triton", plan=plan)
        # ptxas parks a few values across the loops where that saves registers inside.
        check_launches(
            launches, arch, {"shared_prefix_kernel", "merge_splits_kernel"}, stack_bytes=32
        )


# (heads, KV heads, tokens of a row): OPT-13B and Llama, short rows and long ones.
TALL = [(40, 40, 33), (32, 8, 33), (40, 40, 400), (32, 8, 400)]


@pytest.mark.parametrize("shape", TALL, ids=str)
def test_two_blocks_at_once_in_the_shapes_that_count(shape):
    heads, kv_heads, tokens = shape
    batch = random_batch(
        [(64, (tokens, tokens))],
        heads=heads,
        kv_heads=kv_heads,
        dim=128,
        dtype=torch.bfloat16,
        seed=3,
    )
    with dry_launches(90) as launches:
        batch.attend(backend="triton")
    (launch,) = launches
    assert launch.num_warps == 8
    assert launch.kernel.blocks_at_once(8) == 2
    assert launch.kernel.stack_bytes == 0
    # Long rows attend to 64 of their own tokens at a time, which takes more shared memory.
    assert launch.kernel.shared_bytes == (82_944 if tokens < 64 else 114_688)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_label_losses(dtype):
    for num_tokens, vocab, dim in ((1, 49152, 576), (70, 50272, 2048), (512, 128256, 64)):
        hidden = torch.zeros(num_tokens, dim, dtype=dtype)
        lm_head = torch.zeros(vocab, dim, dtype=dtype)
        targets = torch.zeros(num_tokens, dtype=torch.int64)
        bias = torch.zeros(vocab, dtype=dtype)
        for arch in (90, 80) if dtype == torch.bfloat16 else (90,):
            with dry_launches(arch) as launches:
                mk.label_nll(hidden, lm_head, targets, backend="triton")
                mk.label_nll(hidden, lm_head, targets, bias=bias, soft_cap=30.0, backend="triton")
            check_launches(launches, arch, {"label_nll_kernel", "merge_parts_kernel"})
            if arch == 90 and dtype != torch.float32:
                few = {
                    k.kernel.blocks_at_once(k.num_warps) for k in launches if "nll" in k.kernel.name
                }
                assert few == ({2} if num_tokens <= 64 else {1})
