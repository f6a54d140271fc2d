"""The ahead-of-time compiler of the tests sees what it is there to see."""

import re

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from tests.support.aot import compile_kernel, count  # noqa: E402


@triton.jit
def _scale_kernel(x, n, factor, BLOCK: tl.constexpr, FACTORS: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offs, mask=offs < n)
    for i in tl.static_range(len(FACTORS)):
        value *= FACTORS[i]
    tl.store(x + offs, value * factor, mask=offs < n)


@triton.jit
def _many_live_values_kernel(x, y, stride, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    # Every value is needed again after all of them have been computed.
    values = tl.load(x + tl.arange(0, BLOCK))
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(REPEATS):
        total = tl.sqrt(total + values * i) + tl.load(y + i * stride + tl.arange(0, BLOCK))
    tl.store(x + tl.arange(0, BLOCK), total + values)


@triton.jit
def _scratch_kernel(x):
    # A stack array with a run-time index, as a local array of CUDA C++ has.
    value = tl.inline_asm_elementwise(
        """{
        .local .align 4 .b8 scratch[64];
        .reg .u32 at, base;
        and.b32 at, $1, 60;
        mov.u32 base, scratch;
        add.u32 at, at, base;
        st.local.u32 [at], $1;
        ld.local.u32 $0, [base + 8];
        }""",
        "=r,r",
        [tl.load(x + tl.arange(0, 128))],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(x + tl.arange(0, 128), value)


def compile_scale(arch=90, factors=(3.0,), aligned=("x", "n"), **options):
    signature = {"x": "*fp32", "n": "i32", "factor": "fp32"}
    constexprs = {"BLOCK": 1024, "FACTORS": factors}
    return compile_kernel(
        _scale_kernel, signature, constexprs, arch=arch, aligned=aligned, **options
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_a_plain_kernel(arch):
    compiled = compile_scale(arch)
    assert compiled.arch == arch
    assert compiled.stack_bytes == compiled.local_bytes == compiled.shared_bytes == 0
    assert compiled.count("LDL|STL") == 0
    # 1024 elements, 128 threads: two vectors of four each, one multiplication per factor.
    assert compiled.count(r"LDG\.E\.128") == compiled.count(r"STG\.E\.128") == 2
    assert compiled.count("LDG") == compiled.count("STG") == 2
    assert compiled.count("FMUL") == 16
    assert compiled.count("FMUL$") == 16
    assert 8 <= compiled.registers <= 32
    assert compiled.instructions[-1].opcode == "EXIT"
    assert any(i.predicate.startswith("@") for i in compiled.instructions)
    assert re.search(r"^\.visible \.entry _scale_kernel", compiled.ptx, re.MULTILINE)
    assert compiled.count_ptx(r"mul\.(rn\.)?f32") == 16


def test_tuples_and_options_reach_the_compiler():
    assert compile_scale(factors=(3.0, 5.0)).count("FMUL") == 24
    assert compile_scale(num_warps=8).count("FMUL") == 8


def test_a_lost_alignment_shows_as_narrow_accesses():
    compiled = compile_scale(aligned=())
    assert compiled.count(r"LDG\.E\.128") == 0
    assert compiled.count("LDG") == 8


def loop(**options):
    signature = {"x": "*fp32", "y": "*fp32", "stride": "i32"}
    constexprs = {"REPEATS": 100, "BLOCK": 4096}
    return compile_kernel(_many_live_values_kernel, signature, constexprs, **options)


def test_loops_are_found():
    compiled = loop(num_warps=8)
    assert [count(body, r"MUFU\.(RSQ|SQRT)") for body in compiled.loops].count(16) >= 1
    assert compiled.count("LDL|STL") == 0
    assert not compile_scale().loops


def test_spills_are_found():
    # 32 values and 32 sums a thread do not fit into 40 registers.
    compiled = loop(num_warps=4, maxnreg=40)
    assert compiled.registers <= 40
    assert compiled.stack_bytes > 0
    assert compiled.count("LDL") > 0
    assert compiled.count("STL") > 0


def test_a_local_array_is_found():
    compiled = compile_kernel(_scratch_kernel, {"x": "*i32"}, {})
    assert compiled.stack_bytes + compiled.local_bytes >= 64
    assert compiled.count("LDL|STL") >= 2


def test_an_argument_without_a_value_is_an_error():
    with pytest.raises(AssertionError, match=r"without a type or a value: \['n'\]"):
        compile_kernel(_scale_kernel, {"x": "*fp32", "factor": "fp32"}, {"BLOCK": 8, "FACTORS": ()})
