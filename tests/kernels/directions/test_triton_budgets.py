"""What the triton kernels compile to: no spills, wide accesses, few instructions, nothing fused."""

import re
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from mezo_kernels.directions import triton as backend
from mezo_kernels.directions.triton.kernel import perturb_kernel
from tests.support import triton_probes
from tests.support.aot import Compiled, compile_kernel, count

FLAT, STRIDED, GENERAL = range(3)
FLOAT32, _, BFLOAT16 = range(3)
MIXED, GAUSSIAN, RADEMACHER = -1, 0, 1
PAIR = ((0, BFLOAT16, 0, True), (1, BFLOAT16, 0, False))
ELEMENTS = 16  # of a thread: 2048 by 128 threads

SIGNATURE = {
    "tensors_ptr": "*i64",
    "outputs_ptr": "*i64",
    "work_ptr": "*i32",
    "paths_ptr": "*i32",
    "directions_ptr": "*i64",
    "factors_ptr": "*fp32",
    "num_updates_ptr": "*i32",
    "num_tensors": "i32",
    "max_updates": "i32",
}


@dataclass(frozen=True)
class Budget:
    """A kernel and its limits: instructions of the whole program and of the update's loop.

    Both are static, divided by the 16 elements of a thread. The program includes its reads of the
    tables, a division for each vector in the strided path, and the code of all paths that it has.
    The general path computes its elements in four turns, so each costs four times the figure.
    """

    program: float
    loop: float
    registers: int
    wide_loads: int
    wide_stores: int
    roots: float
    paths: tuple[int, ...] = (FLAT,)
    master: int = FLOAT32
    writes: tuple = ()
    domain: int = GAUSSIAN
    has_update: bool = True


# Measured values are 2 to 9 % below the limits: room for another ptxas, not for another algorithm.
BUDGETS = {
    "update fp32": Budget(47.5, 40.5, 80, 4, 4, 0.5),
    "update bf16": Budget(49.5, 41, 80, 2, 2, 0.5, master=BFLOAT16),
    "two bf16 slots": Budget(49, 0, 80, 4, 4, 0.5, writes=PAIR, has_update=False),
    "update and two bf16 slots": Budget(95, 41, 80, 4, 8, 1.0, writes=PAIR),
    "update fp32 by signs": Budget(25, 17, 80, 4, 4, 0.0, domain=RADEMACHER),
    "update fp32 by either": Budget(64, 56, 80, 4, 4, 0.5, domain=MIXED),
    "strided slots": Budget(103, 41, 80, 4, 8, 1.0, writes=PAIR, paths=(STRIDED,)),
    "odd shapes": Budget(92, 81, 112, 0, 0, 0.5, writes=PAIR, paths=(GENERAL,)),
    "all paths": Budget(285, 81, 112, 8, 16, 2.5, writes=PAIR, paths=(FLAT, STRIDED, GENERAL)),
}
_compiled: dict[tuple[str, int], Compiled] = {}


def compiled(name: str, arch: int) -> Compiled:
    key = name, arch
    if key not in _compiled:
        budget = BUDGETS[name]
        constexprs = {
            "PATHS": budget.paths,
            "MASTER": budget.master,
            "WRITES": budget.writes,
            "DOMAIN": budget.domain,
            "HAS_UPDATE": budget.has_update,
            "WORK_BLOCK": 2048,
            "VECTOR": 8 if budget.writes or budget.master != FLOAT32 else 4,
        }
        options = backend.options_of(budget.paths, len(budget.writes))
        _compiled[key] = compile_kernel(perturb_kernel, SIGNATURE, constexprs, arch=arch, **options)
    return _compiled[key]


def over(what: str, got: float, limit: float) -> list[str]:
    return [f"{what}: {got:.1f}, limit {limit:.1f}"] if got > limit else []


def excesses(kernel: Compiled, budget: Budget) -> list[str]:
    """The limits that a kernel exceeds, each with both figures."""
    loops = [len(body) / ELEMENTS for body in kernel.loops]
    found = over("stack bytes", kernel.stack_bytes, 0)
    found += over("LDL and STL", kernel.count("LDL|STL"), 0)
    found += over("registers", kernel.registers, budget.registers)
    found += over("instructions per element", len(kernel.instructions) / ELEMENTS, budget.program)
    found += over("loop instructions per element", max(loops, default=0), budget.loop)
    for what, opcode, wanted in (
        ("LDG.E.128", r"LDG\.E\.128", budget.wide_loads),
        ("STG.E.128", r"STG\.E\.128", budget.wide_stores),
    ):
        if kernel.count(opcode) != wanted:
            found.append(f"{what}: {kernel.count(opcode)}, expected {wanted}")
    if GENERAL not in budget.paths:
        # Accesses to the tables are loads of one thread's own; stores are all of elements.
        found += over("narrow stores", kernel.count("STG") - budget.wide_stores, 0)
        roots = kernel.count(r"MUFU\.RSQ") / ELEMENTS
        if roots != budget.roots:
            found.append(f"MUFU.RSQ per element: {roots}, expected {budget.roots}")
    return found


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", BUDGETS)
def test_budget(name, arch):
    found = excesses(compiled(name, arch), BUDGETS[name])
    assert not found, f"{name}, sm_{arch}: " + "; ".join(found)


def test_a_budget_that_is_too_small_names_both_figures():
    kernel = compiled("update fp32", 90)
    tight = Budget(30, 20, 40, 8, 4, 0.5)
    found = "; ".join(excesses(kernel, tight))
    assert re.search(r"registers: \d+\.\d, limit 40\.0", found)
    assert re.search(r"instructions per element: 4\d\.\d, limit 30\.0", found)
    assert re.search(r"loop instructions per element: \d+\.\d, limit 20\.0", found)
    assert "LDG.E.128: 4, expected 8" in found


def test_spills_exceed_a_budget():
    constexprs = {
        "PATHS": (FLAT,), "MASTER": FLOAT32, "WRITES": PAIR, "DOMAIN": GAUSSIAN,
        "HAS_UPDATE": True, "WORK_BLOCK": 2048, "VECTOR": 8,
    }  # fmt: skip
    options = backend.options_of((FLAT,), 2) | {"maxnreg": 48}
    kernel = compile_kernel(perturb_kernel, SIGNATURE, constexprs, **options)
    found = "; ".join(excesses(kernel, BUDGETS["update and two bf16 slots"]))
    assert "stack bytes" in found
    assert "LDL and STL" in found


# Of two normals, as csrc/philox.h lists them: radius, angle (and r cos, r sin). A product by -2 is
# drawn into the constants of the radius, and a sum there is an fma by -2 for it.
FMA_OF_PAIR = (1 + 7 + 3) + (4 + 4)
MUL_OF_PAIR = 3 + 3 + 2
ADD_OF_PAIR = 2
# Of the root: Newton's step on the approximation of its inverse.
FMA_OF_ROOT = MUL_OF_ROOT = 2


@pytest.mark.parametrize("name", ["update fp32", "update and two bf16 slots", "odd shapes"])
def test_every_rounding_is_asked_for(name):
    ptx = compiled(name, 90).ptx
    assert set(re.findall(r"\b[a-z0-9.]*(?:approx|sqrt)[a-z0-9.]*", ptx)) == {
        "rsqrt.approx.ftz.f32"
    }
    # ptxas may contract an operation that has no .rn.
    assert not re.findall(r"^\s*(?:add|sub|mul|mad|fma)(?:\.ftz)?\.f32", ptx, re.MULTILINE)
    assert not re.findall(r"cvt\.r[zmp]|div\.[a-z.]*f32|\.f64", ptx)


def test_products_and_sums_stay_apart():
    (loop,) = compiled("update fp32", 90).loops
    pairs = ELEMENTS // 2
    # The update is one fma an element.
    assert count(loop, "FFMA") == pairs * (FMA_OF_PAIR + FMA_OF_ROOT + 2)
    assert count(loop, "FMUL") == pairs * (MUL_OF_PAIR + MUL_OF_ROOT)
    # Some negations are sums with -0.
    assert ADD_OF_PAIR <= count(loop, "FADD") / pairs <= ADD_OF_PAIR + 1


def root_of(kernel: Compiled) -> str:
    """What a probe of a root stores, as an expression of what it loads."""
    values: dict[str, str] = {}

    def expression(operand: str) -> str:
        sign, name = re.fullmatch(r"(-?)(.+?)(?:\.reuse)?", operand).groups()
        return sign + values.get(name, name)

    for x in kernel.instructions:
        operands = re.split(r",\s*", x.operands)
        if x.opcode.startswith("LDG"):
            values[operands[0]] = "x"
        elif x.opcode == "STG.E":
            return expression(operands[-1])
        elif values and re.match("MUFU|FMUL|FFMA|FADD", x.opcode):
            inputs = [expression(operand) for operand in operands[1:]]
            values[operands[0]] = f"{x.opcode}({', '.join([*sorted(inputs[:2]), *inputs[2:]])})"
    raise AssertionError("the probe stores nothing")


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_the_root_is_that_of_ptxas(arch):
    # A GPU with another idea of sqrt.rn needs another one here.
    signature = {"x_ptr": "*fp32", "root_ptr": "*fp32"}
    shortened, exact = (
        compile_kernel(
            triton_probes.sqrt_kernel, signature, {"BLOCK": 32, "EXACT": is_exact},
            arch=arch, num_warps=1, enable_fp_fusion=False,
        )
        for is_exact in (False, True)
    )  # fmt: skip
    # For all but these, ptxas calls a subroutine: x - 0x0d000000 > 0x727fffff, as unsigned bits.
    assert re.search(r"ADD3? R\d+, .*(-0xd000000|0xf3000000)", exact.sass)
    assert re.search(r"ISETP\.GT\.U32\.AND P\d, PT, R\d+, 0x727fffff", exact.sass)
    least, most = (torch.tensor(x).view(torch.int32).item() for x in (2.0**-33, 64.0))
    assert least - 0x0D000000 >= 0
    assert most - 0x0D000000 <= 0x727FFFFF
    assert shortened.count("BRA|CALL") == 0
    expected = root_of(exact)
    assert "MUFU.RSQ(x)" in expected
    assert root_of(shortened) == expected
