"""What the Triton kernels of attention and label losses become, without a GPU: nothing spills."""

import pytest

pytest.importorskip("triton")

import torch

from mezo_kernels.attention import triton as attention
from mezo_kernels.attention.triton.kernel import merge_splits_kernel, shared_prefix_kernel
from mezo_kernels.nll import triton as nll
from mezo_kernels.nll.triton.kernel import (
    label_logits_kernel,
    label_nll_kernel,
    merge_parts_kernel,
)
from tests.support.aot import compile_kernel, count

pytestmark = pytest.mark.slow

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What one block may have.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
STRIDES = [
    f"stride_{tensor}_{axis}"
    for tensor, axis in (
        *(("q", axis) for axis in ("token", "head")),
        *((t, axis) for t in ("ks", "vs") for axis in ("token", "head")),
        *((t, axis) for t in ("kc", "vc") for axis in ("slot", "head")),
    )
]


def tiles(found):
    """(constexprs, options) of a launch table."""
    names = ("num_warps", "num_stages", "maxnreg")
    options = {name: found[name] for name in names if name in found}
    return {name: value for name, value in found.items() if name not in options}, options


def compile_attention(dtype, dim, block_m, arch, has_cap, is_long=False):
    block_d = max(16, 1 << (dim - 1).bit_length())
    block_s = attention.block_ss(DTYPES[dtype], dim, arch)[is_long]
    found = attention.tiles_of(DTYPES[dtype], dim, block_m, block_s, arch)
    constexprs, options = tiles(found)
    names = ("q", "k_suffix", "v_suffix", "k_cache", "v_cache", "out")
    signature = {f"{name}_ptr": f"*{dtype}" for name in names}
    signature |= {"lse_ptr": "*fp32", "partial_ptr": "*fp32", "items_ptr": "*i32"}
    signature |= {"qo_indptr_ptr": "*i32", "kv_indices_ptr": "*i64"}
    signature |= dict.fromkeys(STRIDES, "i32")
    constexprs |= {"D": dim, "D_V": dim, "BLOCK_D": block_d, "BLOCK_DV": block_d}
    constexprs |= {"GQA": 4, "HAS_CAP": has_cap, "HAS_LSE": True, "BLOCK_M": block_m}
    return compile_kernel(
        shared_prefix_kernel,
        signature | {"scale": "fp32", "soft_cap": "fp32"},
        constexprs,
        arch=arch,
        aligned=[*signature],
        **options,
    )


def check(compiled, registers):
    assert compiled.count("LDL|STL") == 0
    assert compiled.stack_bytes == compiled.local_bytes == 0
    assert compiled.registers <= registers
    assert compiled.shared_bytes <= SHARED_LIMIT[compiled.arch]


# Most registers of a thread: (dtype, block_m, dim) -> sm_80, sm_90, measured and rounded up to 8.
ATTENTION = {
    ("fp16", 16, 64): (80, 80),
    ("fp16", 16, 80): (168, 128),
    ("fp16", 16, 256): (136, 152),
    ("fp16", 64, 64): (208, 168),
    ("fp16", 64, 80): (192, 128),
    ("fp16", 64, 128): (184, 128),
    ("fp16", 64, 256): (255, 184),
    ("bf16", 16, 128): (136, 96),
    ("bf16", 64, 96): (192, 128),
    ("fp32", 16, 64): (72, 72),
    ("fp32", 16, 256): (160, 136),
}
# The same on sm_90 of tiles for long rows: (block_m, dim) -> registers.
LONG = {(64, 64): 160, (64, 80): 224, (64, 128): 128, (64, 256): 208}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dtype", "block_m", "dim"), ATTENTION)
def test_attention(dtype, block_m, dim, arch):
    assert block_m in attention.block_ms(DTYPES[dtype])
    limits = dict(zip((80, 90), ATTENTION[dtype, block_m, dim], strict=True))
    # The cap is the larger kernel; the other one is compiled where it is used most.
    caps = [True, False] if (block_m, dim) == (64, 128) else [True]
    for has_cap in caps:
        compiled = compile_attention(dtype, dim, block_m, arch, has_cap)
        check(compiled, limits[arch])
        if dtype == "fp32":
            # IEEE products: no tensor core.
            assert compiled.count("HMMA|HGMMA") == 0
            assert compiled.count("FFMA") > 0
        else:
            is_hopper_tile = arch == 90 and block_m == 64
            assert compiled.count("HGMMA" if is_hopper_tile else "HMMA") > 0
            # Keys and values go to shared memory 16 bytes at a time, ahead of their use.
            assert compiled.count(r"LDGSTS\.E\.BYPASS\.128") > 0
        if block_m == 64:
            # The prefix's loop is the first; it does not wait for kv_indices.
            assert count(compiled.loops[0], "HGMMA|HMMA") > 0
            assert count(compiled.loops[0], r"LDG\.") == 0
            if arch == 90 and 64 < dim <= 128:
                assert compiled.blocks_at_once(num_warps=8) == 2


@pytest.mark.parametrize(("block_m", "dim"), LONG)
def test_attention_of_long_rows(block_m, dim):
    compiled = compile_attention("bf16", dim, block_m, 90, has_cap=True, is_long=True)
    check(compiled, LONG[block_m, dim])
    assert compiled.count("HGMMA") > 0
    if dim == 128:
        assert compiled.blocks_at_once(num_warps=8) == 2


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("block_m", "dim"), [(16, 64), (64, 128), (64, 256)])
def test_attention_merge(block_m, dim, arch):
    signature = {"partial_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    signature |= {"merges_ptr": "*i32"}
    constexprs = {"GQA": 4, "D_V": dim, "HAS_LSE": True, "BLOCK_M": block_m, "BLOCK_DV": dim}
    compiled = compile_kernel(
        merge_splits_kernel, signature, constexprs, arch=arch, aligned=[*signature], num_warps=8
    )
    check(compiled, 255)


# Registers of label_nll_kernel of few and of many rows, measured and rounded up to 8.
NLL = {
    ("fp32", 80, 1): 136,
    ("fp32", 90, 1): 136,
    ("fp16", 80, 1): 176,
    ("bf16", 80, 1): 176,
    ("fp16", 90, 1): 208,
    ("bf16", 90, 1): 208,
    ("bf16", 90, 65): 255,
}


@pytest.mark.parametrize(("dtype", "arch", "rows"), NLL)
def test_nll(dtype, arch, rows):
    constexprs, options = tiles(nll.tiles_of(DTYPES[dtype], rows, arch))
    constexprs |= {"HAS_BIAS": True, "HAS_CAP": True}
    signature = {"hidden_ptr": f"*{dtype}", "lm_head_ptr": f"*{dtype}", "bias_ptr": "*fp32"}
    signature |= {"targets_ptr": "*i64", "parts_ptr": "*fp32", "logits_ptr": "*fp32"}
    aligned = [*signature, "stride_hidden", "stride_lm_head", "D"]
    integers = ("stride_hidden", "stride_lm_head", "T", "V", "D", "vocab_start", "tiles_per_split")
    signature |= dict.fromkeys(integers, "i32") | {"logit_scale": "fp32", "soft_cap": "fp32"}
    limit = NLL[dtype, arch, rows]
    kernels = [(label_nll_kernel, constexprs)]
    if rows == 1:
        kernels.append((label_logits_kernel, constexprs | {"BLOCK_V": 16}))
    for kernel, constants in kernels:
        own = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
        compiled = compile_kernel(
            kernel,
            own,
            constants,
            arch=arch,
            aligned=[name for name in aligned if name in own],
            **options,
        )
        check(compiled, limit)
        if dtype == "fp32":
            assert compiled.count("HMMA|HGMMA") == 0
        else:
            assert compiled.count("HGMMA" if arch == 90 else "HMMA") > 0
            assert compiled.count(r"LDGSTS\.E\.BYPASS\.128") > 0
        # While one block of few rows adds up, another one multiplies.
        if arch == 90 and kernel is label_nll_kernel and dtype != "fp32":
            assert compiled.blocks_at_once(options["num_warps"]) == (2 if rows == 1 else 1)


@pytest.mark.parametrize("arch", [80, 90])
def test_nll_merge(arch):
    signature = {"parts_ptr": "*fp32", "merged_ptr": "*fp32", "T": "i32", "num_splits": "i32"}
    pointers = ["parts_ptr", "merged_ptr"]
    compiled = compile_kernel(
        merge_parts_kernel,
        signature,
        {"BLOCK_T": 32, "BLOCK_S": 32},
        arch=arch,
        aligned=pointers,
    )
    check(compiled, 64)
