"""Ahead-of-time compilation of Triton kernels: what comes out, without a GPU.

    compiled = compile_kernel(kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 1024}, aligned=["x"])
    assert compiled.stack_bytes == 0 and compiled.count("LDL|STL") == 0
    assert compiled.count(r"LDG\\.E\\.128") == 2

The wheel of triton brings ptxas and cuobjdump along; triton 3.6 and 3.7 work.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: `@P0 IMAD.WIDE R2, ...` at an address of the kernel."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def branch_target(self) -> int | None:
        """Where a branch goes, or None."""
        target = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(target[1], 16) if self.opcode.startswith("BRA") and target else None


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    Args:
        name: the kernel's name.
        arch: the compute capability, e.g. 90.
        ptx: the PTX text.
        sass: the SASS text of cuobjdump.
        registers: registers of a thread.
        stack_bytes: stack frame of a thread; spills and arrays with run-time indices need one.
        local_bytes: other local memory of a thread.
        shared_bytes: shared memory of a block.
    """

    name: str
    arch: int
    ptx: str
    sass: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """All instructions but the padding at the end: NOPs and a branch to itself."""
        found = []
        for line in self.sass.splitlines():
            match = _SASS_LINE.match(line)
            if match:
                address, predicate, opcode, operands = match.groups()
                found.append(Instruction(int(address, 16), predicate or "", opcode, operands))
        while found and (found[-1].opcode == "NOP" or found[-1].branch_target == found[-1].address):
            found.pop()
        return tuple(found)

    @property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """The loop bodies, in the order of their ends: from a backward branch's target to it."""
        return [
            tuple(
                i for i in self.instructions if branch.branch_target <= i.address <= branch.address
            )
            for branch in self.instructions
            if branch.branch_target is not None and branch.branch_target < branch.address
        ]

    def count(self, opcode: str) -> int:
        """How many instructions have an opcode whose beginning the regular expression matches."""
        return count(self.instructions, opcode)

    def blocks_at_once(self, num_warps: int) -> int:
        """How many blocks of so many warps fit on a multiprocessor of sm_80 or sm_90.

        It has 65,536 registers, given out 256 a warp, 64 warps, and 164 or 228 KiB of shared
        memory, of which each block takes 1 KiB beside its own.
        """
        registers = -(-self.registers * 32 // 256) * 256 * num_warps
        shared = {80: 164, 90: 228}[self.arch] * 1024
        return min(65536 // registers, shared // (self.shared_bytes + 1024), 64 // num_warps)

    def count_ptx(self, opcode: str) -> int:
        """How many PTX instructions have an opcode that the regular expression matches whole."""
        statement = re.compile(rf"^\s*\{{?\s*(?:@!?%\w+\s+)?(?:{opcode})\s", re.MULTILINE)
        return len(statement.findall(self.ptx))


def count(instructions: Iterable[Instruction], opcode: str) -> int:
    """How many of the instructions have an opcode whose beginning the expression matches."""
    pattern = re.compile(opcode)
    return sum(pattern.match(instruction.opcode) is not None for instruction in instructions)


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    arch: int = 90,
    aligned: Iterable[str] = (),
    **options: Any,
) -> Compiled:
    """Compile a `@triton.jit` function for a GPU that need not be here.

    Args:
        fn: the kernel, not wrapped by an autotuner.
        signature: the type of each run-time argument, e.g. "*fp32", "i32".
        constexprs: the value of each constexpr argument.
        arch: compute capability times ten: 80, 90.
        aligned: arguments that the compiler may assume to be divisible by 16, as the launcher finds
            out about pointers and sizes unless they are excluded from specialisation.
        options: num_warps, num_stages, maxnreg, enable_fp_fusion and what else a launch accepts.

    Returns:
        What came out.
    """
    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    missing = set(fn.arg_names) - set(signature) - set(constexprs)
    assert not missing, f"{fn.__name__}: arguments without a type or a value: {sorted(missing)}"
    source = ASTSource(fn, types, dict(constexprs), attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return of_kernel(kernel, fn.__name__, arch)


def of_kernel(kernel: Any, name: str, arch: int) -> Compiled:
    """Read what triton's compiled kernel became."""
    sass, resources = _dump(kernel.asm["cubin"])
    registers, stack, _, local = map(int, _RESOURCES.search(resources).groups())
    return Compiled(
        name=name,
        arch=arch,
        ptx=kernel.asm["ptx"],
        sass=sass,
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        shared_bytes=kernel.metadata.shared,
    )


def _dump(cubin: bytes) -> tuple[str, str]:
    """The output of cuobjdump -sass and -res-usage."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        return tuple(
            subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout
            for flag in ("-sass", "-res-usage")
        )
