"""What the kernels of perturbed_lora compile to, without a GPU: registers, spills, SASS per z."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from tests.support import cuda_sass

pytestmark = pytest.mark.proof

ARCHS = ("sm_80", "sm_90")
needs_nvcc = pytest.mark.skipif(
    cuda_sass.find_nvcc() is None or cuda_sass.find_nvdisasm() is None,
    reason="compiling and reading CUDA kernels needs nvcc and nvdisasm",
)

# Most registers of a thread: 256 threads a block in shrink (two blocks on a multiprocessor have 128
# registers), 128 in expand.
REGISTERS = {
    "shrink<Gaussian,1>": 96,
    "shrink<Gaussian,2>": 128,
    "shrink<Any,1>": 96,
    "shrink<Any,2>": 128,
    "expand<Gaussian,8>": 72,
    "expand<Gaussian,16>": 80,
    "expand<Gaussian,32>": 104,
    "expand<Gaussian,64>": 152,
    "expand<Any,8>": 72,
    "expand<Any,16>": 80,
    "expand<Any,32>": 104,
    "expand<Any,64>": 152,
    "finish": 40,
}
# Static SASS that one z more costs, for both signs: draw, two fma, two roundings, loads, addresses.
SASS_PER_Z = {"Gaussian": 44.0, "Any": 51.0}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """{arch: {name without the dtype: [fp16, bf16]}}; about 20 s."""
    found: dict[str, dict[str, list[cuda_sass.Kernel]]] = {}
    directory = tmp_path_factory.mktemp("sass")
    for arch in ARCHS:
        by_name = found.setdefault(arch, {})
        compiled = cuda_sass.compile_kernels(arch, directory, cuda_sass.LORA)
        for name, kernel in sorted(compiled.items()):
            by_name.setdefault(re.sub(r",[12](,\d+>)", r"\1", name), []).append(kernel)
    return found


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_every_cuda_kernel_has_a_budget(kernels, arch):
    assert set(kernels[arch]) == set(REGISTERS)
    assert {len(both) for name, both in kernels[arch].items() if name != "finish"} == {2}


@needs_nvcc
@pytest.mark.parametrize("name", REGISTERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_cuda_registers_and_accesses(kernels, arch, name):
    for kernel in kernels[arch][name]:
        assert kernel.registers <= REGISTERS[name]
        assert (kernel.stack, kernel.spills) == (0, 0)
        for opcode in ("LDL", "STL", "LD.E", "ST.E", "LDG.E.U", "STG.E.U"):
            assert kernel.count(opcode) == 0, opcode
        # Masters, x, y and the partial sums are read 16 bytes at a time, h 8.
        assert kernel.count("LDG.E.128") >= 8
        if name == "finish":
            continue
        size = int(name[:-1].split(",")[1])
        products = 16 * size if name.startswith("shrink") else max(16, size)
        assert kernel.count("HMMA.16816") == products
        wanted = ("STG.E.64", 4) if name.startswith("shrink") else ("STG.E.128", 8)
        assert kernel.count(wanted[0]) == kernel.count("STG") == wanted[1]


@needs_nvcc
@pytest.mark.parametrize("draw", SASS_PER_Z)
@pytest.mark.parametrize("arch", ARCHS)
def test_cuda_sass_per_z(kernels, arch, draw):
    for more, less, normals in (
        (f"shrink<{draw},2>", f"shrink<{draw},1>", 16),
        (f"expand<{draw},32>", f"expand<{draw},16>", 16),
        (f"expand<{draw},64>", f"expand<{draw},32>", 32),
    ):
        for i in range(2):
            paths = [kernels[arch][name][i].path("MUFU.RSQ") for name in (more, less)]
            assert paths[0]["MUFU.RSQ"] - paths[1]["MUFU.RSQ"] == normals // 2
            per_z = (paths[0]["all"] - paths[1]["all"]) / normals
            assert per_z <= SASS_PER_Z[draw], f"{more} on {arch}: {per_z:.1f} SASS per z"


# ---- Triton: (half, dtype, rank) -> most registers on sm_80 and sm_90, measured and rounded up
TRITON = {
    ("shrink", "bf16", 8): (96, 88),
    ("shrink", "bf16", 16): (112, 88),
    ("shrink", "fp16", 64): (184, 136),
    ("shrink", "fp32", 8): (136, 128),
    ("shrink", "fp32", 16): (128, 128),
    ("expand", "bf16", 8): (232, 200),
    ("expand", "bf16", 16): (128, 128),
    ("expand", "fp16", 64): (256, 216),
    ("expand", "fp32", 8): (200, 200),
    ("expand", "fp32", 16): (144, 144),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of one block, so that a multiprocessor holds two.
SHARED_LIMIT = {80: 80 * 1024, 90: 112 * 1024}


@functools.cache
def compile_half(half, dtype, rank, arch, is_even=True, is_aligned=True, domain=0):
    pytest.importorskip("triton")
    from bench.experiments.lora import triton
    from bench.experiments.lora.triton import kernel as triton_kernel
    from tests.support.aot import compile_kernel

    tiles_of = {"shrink": triton.shrink_tiles, "expand": triton.expand_tiles}[half]
    tiles = tiles_of(DTYPES[dtype], rank, is_even)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    first = ("x_ptr", "a_ptr", "partials_ptr") if half == "shrink" else ("h_ptr", "b_ptr", "y_ptr")
    kinds = (dtype, "fp32", "fp32" if half == "shrink" else dtype)
    signature = {name: f"*{kind}" for name, kind in zip(first, kinds, strict=True)}
    signature |= {"pairs_ptr": "*i32", "directions_ptr": "*i64", "scales_ptr": "*fp32"}
    aligned = list(signature)
    if half == "shrink":
        sizes, more = ("stride_x", "stride_a", "num_rows", "D", "R"), ("stride_x", "stride_a", "D")
    else:
        sizes, more = ("stride_b", "stride_y", "D_out", "R"), ("stride_y", "D_out")
        signature["scaling"] = "fp32"
    signature |= dict.fromkeys((*sizes, "uid", "element0", "global_cols"), "i32")
    if is_even:
        aligned += [*more, *(("R",) if rank % 16 == 0 else ())]
    constexprs = {"DOMAIN": domain, "IS_ALIGNED": is_aligned, "IS_PAIR": True, **tiles}
    kernel = {"shrink": triton_kernel.shrink_kernel, "expand": triton_kernel.expand_kernel}[half]
    if half == "expand":
        constexprs["IS_ADDED"] = True
    return compile_kernel(
        kernel, signature, constexprs, arch=arch, aligned=aligned, enable_fp_fusion=False, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("half", "dtype", "rank"), TRITON)
def test_triton(half, dtype, rank, arch):
    compiled = compile_half(half, dtype, rank, arch)
    assert compiled.count("LDL|STL") == 0
    assert compiled.stack_bytes == compiled.local_bytes == 0
    assert compiled.registers <= dict(zip((80, 90), TRITON[half, dtype, rank], strict=True))[arch]
    assert compiled.shared_bytes <= SHARED_LIMIT[arch]
    if dtype == "fp32":
        assert compiled.count("HMMA|HGMMA") == 0
    else:
        # An output 8 wide is too narrow for a warp group.
        is_narrow = half == "shrink" and rank == 8
        assert compiled.count("HGMMA" if arch == 90 and not is_narrow else "HMMA") > 0


@pytest.mark.parametrize(("half", "rank"), [("shrink", 8), ("shrink", 16), ("expand", 8)])
def test_triton_draws_each_z_once(half, rank):
    # A root for two normals: both signs share them, and padding has none.
    compiled = compile_half(half, "bf16", rank, 90)
    pytest.importorskip("triton")
    from bench.experiments.lora import triton

    if half == "shrink":
        tiles = triton.shrink_tiles(torch.bfloat16, rank, True)
        normals = tiles["BLOCK_R"] * tiles["BLOCK_K"]
    else:
        tiles = triton.expand_tiles(torch.bfloat16, rank, True)
        normals = tiles["BLOCK_N"] * rank
    assert compiled.count(r"MUFU\.RSQ") * 2 * 32 * tiles["num_warps"] == normals


@pytest.mark.slow
@pytest.mark.parametrize("half", ["shrink", "expand"])
def test_triton_any_shape_and_direction(half):
    for is_even, is_aligned, domain in (
        (False, False, 0),
        (False, True, 0),
        (True, True, 1),
        (False, False, -1),
    ):
        for dtype in ("bf16", "fp32"):
            for rank in (4, 16, 64):
                compiled = compile_half(half, dtype, rank, 90, is_even, is_aligned, domain)
                case = (is_even, is_aligned, domain, dtype, rank)
                assert compiled.count("LDL|STL") == 0, case
                assert compiled.stack_bytes == compiled.local_bytes == 0, case


@pytest.mark.parametrize("half", ["shrink", "expand"])
def test_triton_fuses_nothing_by_itself(half):
    ptx = compile_half(half, "bf16", 16, 90).ptx
    # ptxas may contract an operation that has no .rn.
    assert not re.findall(r"^\s*(?:add|sub|mul|mad|fma)(?:\.ftz)?\.f32", ptx, re.MULTILINE)
