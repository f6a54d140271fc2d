"""What the launching code of the experiments asks of a GPU: every launch compiles and fits."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import mezo_kernels as mk
from bench.experiments.device_step import DeviceStep
from tests.bench.experiments import lora_cases
from tests.support.dry_launch import check_launches, dry_launches

pytestmark = [pytest.mark.slow, pytest.mark.proof]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_a_step_with_its_scalars_on_the_device():
    specs = [mk.TensorSpec("a", (8, 576)), mk.TensorSpec("b", (576, 8))]
    masters = [torch.zeros(spec.shape) for spec in specs]
    slots = [[torch.zeros(s.shape, dtype=torch.bfloat16) for s in specs] for _ in range(4)]
    plan = mk.AdapterPlan(masters, specs, slots)
    state = DeviceStep(plan, seed=1, num_directions=2, lr=0.1, eps=0.1)
    with dry_launches() as launches:
        state.perturb(backend="triton")
        state.apply_update_(backend="triton")
    check_launches(launches, 90, {"perturb_kernel"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturbed_lora(dtype):
    shapes = [(8, 576, 192, "whole"), (16, 4096, 1024, "even"), (64, 512, 200, "whole")]
    shapes += [(3, 520, 200, "odd")]
    for arch in (90, 80) if dtype == torch.bfloat16 else (90,):
        for rank, d_in, d_out, shard in shapes:
            problem = lora_cases.make(dtype, rank, d_in, d_out, shard=shard, has_out=True)
            with dry_launches(arch) as launches:
                problem.run(lora_cases.Target("triton", "cpu"))
            check_launches(launches, arch, {"shrink_kernel", "finish_kernel", "expand_kernel"})
