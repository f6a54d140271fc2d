"""Registers, stack and SASS of the CUDA kernels, from nvcc; no GPU is needed.

SASS per element is a static count over 16 elements, what a thread of the vector kernels computes:

* ``path``: all that a thread of a full block executes once, from the first instruction to EXIT,
  tables, addresses and stores included, with an update of one direction; slots are bf16 for the
  Gaussian and fp32 for Rademacher. `cuda_sass.Kernel.path` says how it is found.
* ``loop``: one direction more, the body of the loop over the directions of an update.

Every Gaussian costs half a MUFU.RSQ, so the number of them on a path says how many normals it
draws: without that check, a count could be low because it counts the wrong path.
"""

import re
import shutil
from dataclasses import dataclass, replace

import pytest

from tests.support import cuda_sass

ELEMENTS = 16
ARCHS = ("sm_90", "sm_80")


@dataclass(frozen=True)
class Budget:
    """Upper limits; for the path, how many Gaussians an element needs and its dtypes.

    fp32 shows in the number of 16-byte stores, bf16 in that of packed conversions.
    """

    registers: int
    path: float | None = None
    path_draws: int = 0
    path_dtype: tuple[str, int] = ("F2FP.BF16", ELEMENTS)
    loop: float | None = None


# Slightly above what nvcc 13.0 gives, by what the lanes of mezo_kernels/directions/cuda.py are in a
# kernel: how many neighbours a thread has, 8 or 4, which goes for {}.
PATHS = {
    8: {
        "add<Gaussian,{},1>": 47.0,
        "pair<Gaussian,{},0>": 52.0,
        "pair<Gaussian,{},1>": 93.0,
        "pair<Rademacher,{},0>": 20.0,
        "pair<Rademacher,{},1>": 32.0,
    },
    4: {
        "add<Gaussian,{},1>": 51.5,
        "pair<Gaussian,{},0>": 55.0,
        "pair<Gaussian,{},1>": 97.0,
        "pair<Rademacher,{},0>": 30.5,
        "pair<Rademacher,{},1>": 49.0,
    },
}
BUDGETS = {
    "add<Gaussian,{},1>": Budget(64, path_draws=1, path_dtype=("STG.E.128", 4), loop=39.5),
    "add<Gaussian,{},0>": Budget(64, loop=39.5),
    "add<Rademacher,{},0>": Budget(64),
    "add<Any,{},0>": Budget(96, loop=68.0),
    "pair<Gaussian,{},0>": Budget(64, path_draws=1),
    "pair<Gaussian,{},1>": Budget(72, path_draws=2),
    "pair<Rademacher,{},0>": Budget(64, path_dtype=("STG.E.128", 8)),
    "pair<Rademacher,{},1>": Budget(72, path_dtype=("STG.E.128", 12)),
    "perturb<Gaussian,{}>": Budget(64),
    "perturb<Rademacher,{}>": Budget(64),
    "perturb<Any,{}>": Budget(96),
}


def budgets_on(arch: str) -> dict[str, Budget]:
    found = {"sample": Budget(64), "normals": Budget(32)}
    for run, paths in PATHS.items():
        for name, budget in BUDGETS.items():
            path = paths.get(name)
            # sm_80 leaves loops at their top, so that no path through the body without a second
            # round exists; its loops are counted all the same.
            if arch == "sm_80" and name.startswith("add"):
                path = None
            found[name.format(run)] = replace(budget, path=path)
    return found


CASES = [(arch, name) for arch in ARCHS for name in budgets_on(arch)]
VECTOR_KERNELS = ("add", "pair", "perturb")

pytestmark = pytest.mark.skipif(
    cuda_sass.find_nvcc() is None or cuda_sass.find_nvdisasm() is None,
    reason="compiling and reading CUDA kernels needs nvcc and nvdisasm",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """{arch: {name: kernel}}, the directions' sources for all architectures; about 10 s of CPU."""
    directory = tmp_path_factory.mktemp("sass")
    sources = cuda_sass.DIRECTIONS
    return {arch: cuda_sass.compile_kernels(arch, directory, sources) for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_has_a_budget(kernels, arch):
    assert set(kernels[arch]) == set(budgets_on(arch))


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_registers_and_stack(kernels, arch, name):
    kernel, budget = kernels[arch][name], budgets_on(arch)[name]
    assert kernel.registers <= budget.registers, (
        f"{name} on {arch}: {kernel.registers} registers, budget {budget.registers}"
    )
    assert (kernel.stack, kernel.spills) == (0, 0), f"{name} on {arch} uses local memory"
    for opcode in ("LDL", "STL"):
        assert kernel.count(opcode) == 0, f"{name} on {arch}: {kernel.count(opcode)} {opcode}"


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_sass_per_element_on_the_path(kernels, arch, name):
    budget = budgets_on(arch)[name]
    if budget.path is None:
        return
    opcode, count = budget.path_dtype
    path = kernels[arch][name].path("MUFU.RSQ", opcode)
    assert path["MUFU.RSQ"] == budget.path_draws * ELEMENTS // 2
    assert path[opcode] == count
    per_element = path["all"] / ELEMENTS
    assert per_element <= budget.path, (
        f"{name} on {arch}: {per_element:.2f} SASS per element, budget {budget.path}"
    )


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_sass_per_element_of_the_loop(kernels, arch, name):
    budget = budgets_on(arch)[name]
    if budget.loop is None:
        return
    loop = kernels[arch][name].hot_loop()
    assert loop["MUFU.RSQ"] == ELEMENTS // 2
    per_element = loop["all"] / ELEMENTS
    assert per_element <= budget.loop, (
        f"{name} on {arch}: {per_element:.2f} SASS per element, budget {budget.loop}"
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_gaussian_vector_kernels_use_no_other_slow_function(kernels, arch):
    vector_kernels = ("add<Gaussian,{},1>", "pair<Gaussian,{},0>", "pair<Gaussian,{},1>")
    for name in (name.format(run) for run in PATHS for name in vector_kernels):
        kernel = kernels[arch][name]
        assert kernel.count("MUFU") == kernel.count("MUFU.RSQ") > 0, name
        # I2FP is a conversion at full speed, which sm_80 does not have.
        conversions = {i.opcode.split(".")[0] for i in kernel.instructions if "I2F" in i.opcode}
        assert conversions == ({"I2FP"} if arch == "sm_90" else {"I2F"}), name


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("arch", ARCHS)
def test_philox_rounds_are_wide_multiplies(kernels, arch, run):
    # Four calls a thread of 20 products each, of which the first two rounds share one or two; a
    # few more are addresses. A product split into low and high halves would make it half.
    kernel = kernels[arch][f"add<Gaussian,{run},1>"]
    products = kernel.count("IMAD.WIDE.U32")
    num_runs = ELEMENTS // run
    assert 4 * 18 - 2 <= products <= 4 * 20 + 6 * num_runs, products
    # The rows of the runs, by only the high half of a product.
    assert kernel.count("IMAD.HI.U32") <= 2 * num_runs


# By kernel and neighbours: loads of 16 bytes, tables included, stores of 16 and of 8 bytes. fp32 is
# stored by 16 bytes; 16-bit elements as eight by 16, as four by 8.
ACCESSES = {
    ("add", 8): (8, 6, 0),
    ("add", 4): (6, 4, 4),
    ("pair 0", 8): (6, 12, 0),
    ("pair 0", 4): (6, 8, 8),
    ("pair 1", 8): (6, 16, 0),
    ("pair 1", 4): (6, 12, 8),
    ("perturb", 8): (4, 8, 0),
    ("perturb", 4): (4, 6, 4),
}


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_vector_accesses(kernels, arch, name):
    if not name.startswith(VECTOR_KERNELS):
        return
    kernel = kernels[arch][name]
    what, _, run, *has_update = re.findall(r"\w+", name)
    key = f"pair {has_update[0]}" if what == "pair" else what
    widths = tuple(kernel.count(opcode) for opcode in ("LDG.E.128", "STG.E.128", "STG.E.64"))
    assert widths == ACCESSES[key, int(run)], name
    # Generic accesses use a slower path, and byte accesses mean a missed alignment.
    for opcode in ("LD.E", "ST.E", "LDG.E.U8", "STG.E.U8"):
        assert kernel.count(opcode) == 0, f"{name}: {opcode}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="nvcc needs a host compiler")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_square_root_is_the_one_of_nvcc(tmp_path, arch):
    """The steps of sqrt_rn in csrc/philox.h are those of __fsqrt_rn within its range check."""
    source = tmp_path / "root.cu"
    source.write_text(
        '#include "philox.h"\n'
        'extern "C" __global__ void theirs_kernel(float* p) { *p = __fsqrt_rn(*p); }\n'
        'extern "C" __global__ void ours_kernel(float* p) { *p = mezo::sqrt_rn(*p); }\n'
    )
    listing = cuda_sass.disassemble_source(source, arch, tmp_path)
    ours, theirs = (values(listing[name]) for name in ("ours_kernel", "theirs_kernel"))
    assert len(ours) == 5
    # The root itself comes last, and contains everything before it.
    assert ours[-1].count("MUFU.RSQ(x)") == 4
    assert ours[-1] in theirs


def values(instructions) -> list[str]:
    """What each fp32 step computes, as a formula in x, the first register that is read.

    .FTZ is dropped: nothing is subnormal from 2^-101 up.
    """
    formulas: list[str] = []
    registers: dict[str, str] = {}
    for one in instructions:
        opcode = one.opcode.replace(".FTZ", "")
        if one.is_predicated or opcode not in ("MUFU.RSQ", "FMUL", "FFMA"):
            continue
        operands = one.text.replace(".reuse", "").split(maxsplit=1)[1].split(", ")
        target, *sources = (operand.strip() for operand in operands)
        known = [
            source.replace(bare, registers.get(bare, "x")) if bare.startswith("R") else source
            for source in sources
            for bare in [source.lstrip("-")]
        ]
        # A product is the same whichever factor comes first, and wherever its sign stands.
        factors = sorted(factor.lstrip("-") for factor in known[:2])
        sign = "-" * (sum(factor.startswith("-") for factor in known[:2]) % 2)
        registers[target] = f"{opcode}({sign}{', '.join([*factors, *known[2:]])})"
        formulas.append(registers[target])
    return formulas
