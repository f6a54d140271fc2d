"""What the launching code asks of a GPU: every launch compiles and fits, without spills."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import mezo_kernels as mk
from tests.support import direction_cases, lora_cases
from tests.support.aot import count
from tests.support.dry_launch import SHARED_LIMIT, dry_launches
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


def check(launches, arch, expected, stack_bytes=0):
    """All kernels expected, within what a block may have there; no spills in loops."""
    assert {launch.kernel.name for launch in launches} == expected
    for launch in launches:
        kernel = launch.kernel
        assert kernel.stack_bytes <= stack_bytes, launch
        assert not any(count(body, "LDL|STL") for body in kernel.loops), launch
        assert kernel.shared_bytes <= SHARED_LIMIT[arch], launch
        assert kernel.registers * 32 * launch.num_warps <= 65536, launch
        assert all(0 < size <= 65535 for size in launch.grid[1:]), launch


# Work blocks of other sizes than the plan's are there for their bits alone.
DIRECTION_CASES = [n for n in direction_cases.CASES if not n.startswith("other_block_sizes")]


@pytest.mark.parametrize(
    ("arch", "prefix"), [(90, ""), (80, "perturb_into_a_pool"), (80, "perturb_pair")]
)
def test_direction_calls(arch, prefix):
    for name in DIRECTION_CASES:
        if name.startswith(prefix):
            with dry_launches(arch) as launches:
                direction_cases.CASES[name]("triton", "cpu")
            check(launches, arch, {launch.kernel.name for launch in launches})
            assert launches or "empty" in name


def test_a_step_with_its_scalars_on_the_device():
    specs = [mk.TensorSpec("a", (8, 576)), mk.TensorSpec("b", (576, 8))]
    masters = [torch.zeros(spec.shape) for spec in specs]
    slots = [[torch.zeros(s.shape, dtype=torch.bfloat16) for s in specs] for _ in range(4)]
    plan = mk.AdapterPlan(masters, specs, slots)
    state = mk.DeviceStep(plan, seed=1, num_directions=2, lr=0.1, eps=0.1)
    with dry_launches() as launches:
        mk.perturb_into(plan, scalars=state, backend="triton")
        mk.add_directions_(plan, scalars=state, backend="triton")
    check(launches, 90, {"perturb_kernel"})


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
        check(launches, arch, {"shared_prefix_kernel", "merge_splits_kernel"}, stack_bytes=32)


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
            check(launches, arch, {"label_nll_kernel", "merge_parts_kernel"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturbed_lora(dtype):
    shapes = [(8, 576, 192, "whole"), (16, 4096, 1024, "even"), (64, 512, 200, "whole")]
    shapes += [(3, 520, 200, "odd")]
    for arch in (90, 80) if dtype == torch.bfloat16 else (90,):
        for rank, d_in, d_out, shard in shapes:
            problem = lora_cases.make(dtype, rank, d_in, d_out, shard=shard, has_out=True)
            with dry_launches(arch) as launches:
                problem.run(lora_cases.Target("triton", "cpu"))
            check(launches, arch, {"shrink_kernel", "finish_kernel", "expand_kernel"})
