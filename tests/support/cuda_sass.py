"""What nvcc makes of CUDA sources: registers, stack, SASS, and the path of a full block."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.native_sources import CSRC, EXPERIMENTS, paths

DIRECTIONS = [path for path in paths(CSRC, "cuda") if path.suffix == ".cu"]
LORA = [EXPERIMENTS / "expand.cu", EXPERIMENTS / "shrink.cu"]
STEP = [EXPERIMENTS / "step.cu"]
# As CMakeLists.txt has them.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false")

_KERNEL = re.compile(
    r"\d+(add|pair|perturb|sample|advance|normals|shrink|finish|expand)_kernel(.*)"
)
_ARGUMENTS = re.compile(r"\d+(Gaussian|Rademacher|Any)DrawE?((?:L[bil]\d+E)*)")
_LABEL = re.compile(r"(\.L_x_\d+)")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_nvdisasm() -> str | None:
    """The toolkit's, else the one in the triton wheel."""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    if found is not None:
        return found
    try:
        from triton.backends import nvidia
    except ImportError:
        return None
    return shutil.which("nvdisasm", path=str(Path(next(iter(nvidia.__path__))) / "bin"))


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: its opcode with modifiers, its text, and where it may jump."""

    opcode: str
    text: str
    is_predicated: bool
    target: int | None


@dataclass
class Kernel:
    """One kernel of one cubin."""

    name: str
    registers: int
    stack: int
    spills: int
    instructions: list[Instruction]

    def count(self, opcode: str) -> int:
        return sum(i.opcode.startswith(opcode) for i in self.instructions)

    def path(self, *preferred: str) -> dict[str, int]:
        """Count what one thread executes, by the opcodes asked for, with "all" of them.

        The control-flow graph without the branches that close a loop is acyclic: each loop runs
        once. Of all paths from the entry to an EXIT, this is the one with most instructions of the
        first preferred opcode, then of the second ..., and then fewest instructions of all. With
        "MUFU.RSQ" first, that is the path of a thread that draws all it can, i.e. of a full block
        with an update of one direction; "F2FP.BF16" next chooses bf16 slots where a branch on the
        dtype leaves the choice.
        """
        impossible = (float("-inf"),) * (len(preferred) + 1)
        best: dict[int, tuple[float, ...]] = {}
        for i in self._leaves_first():
            one = self.instructions[i]
            # A way that is not known yet closes a loop.
            ways = [best.get(to, impossible) for to in self._successors(i)]
            if one.opcode == "EXIT":
                ways.append((0,) * (len(preferred) + 1))
            here = max(ways, default=impossible)
            counts = (here[k] + one.opcode.startswith(p) for k, p in enumerate(preferred))
            best[i] = (*counts, here[-1] - 1)
        *counts, negative = best[0]
        return {p: int(c) for p, c in zip(preferred, counts, strict=True)} | {"all": int(-negative)}

    def _successors(self, i: int) -> list[int]:
        one = self.instructions[i]
        following = [] if one.target is None else [one.target]
        if one.opcode not in ("EXIT", "BRA") or one.is_predicated:
            following.append(i + 1)
        return [to for to in following if to < len(self.instructions)]

    def _leaves_first(self) -> list[int]:
        """Depth-first postorder from the entry."""
        order: list[int] = []
        seen = {0}
        stack = [(0, iter(self._successors(0)))]
        while stack:
            i, ways = stack[-1]
            to = next((way for way in ways if way not in seen), None)
            if to is None:
                order.append(i)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(self._successors(to))))
        return order

    def hot_loop(self) -> dict[str, int]:
        """Count the backward branch's span that has most MUFU.RSQ and no loop with any inside."""
        spans = [
            self.instructions[one.target : i + 1]
            for i, one in enumerate(self.instructions)
            if one.target is not None and one.target <= i
        ]
        draws = [(sum(one.opcode == "MUFU.RSQ" for one in span), -len(span)) for span in spans]
        rsq, length = max(draw for draw in draws if draw[0])
        return {"MUFU.RSQ": rsq, "all": -length}


def compile_kernels(arch: str, directory: Path, sources: list[Path]) -> dict[str, Kernel]:
    """Compile sources to cubins for one architecture; a few seconds each."""
    kernels: dict[str, Kernel] = {}
    for source in sources:
        cubin = directory / f"{source.stem}_{arch}.cubin"
        command = [str(find_nvcc()), *FLAGS, f"-I{CSRC}", f"-arch={arch}", "-cubin"]
        command += ["-Xptxas", "-v", "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        resources = _resources(result.stderr + result.stdout)
        for mangled, instructions in _disassemble(cubin).items():
            name = _name(mangled)
            kernels[name] = Kernel(name, *resources[mangled], instructions)
    return kernels


def disassemble_source(source: Path, arch: str, directory: Path) -> dict[str, list[Instruction]]:
    """Compile one more source, which may include what csrc has, and disassemble its kernels."""
    cubin = directory / f"{source.stem}_{arch}.cubin"
    command = [str(find_nvcc()), *FLAGS, f"-I{CSRC}", f"-arch={arch}", "-cubin"]
    result = subprocess.run(
        [*command, "-o", str(cubin), str(source)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return _disassemble(cubin)


def _name(mangled: str) -> str:
    """add<Gaussian,8,1> of a mangled name."""
    found = _KERNEL.search(mangled)
    assert found is not None, mangled
    arguments = _ARGUMENTS.search(found[2])
    if arguments is None:
        return found[1]
    draw, constants = arguments.groups()
    return f"{found[1]}<{','.join([draw, *re.findall(r'[0-9]+', constants)])}>"


def _resources(log: str) -> dict[str, tuple[int, int, int]]:
    """(registers, stack bytes, spill bytes) by mangled name, from ptxas -v."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        numbers = [
            re.search(pattern, part)
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill st")
        ]
        assert all(numbers), part
        registers, stack, spills = (int(n[1]) for n in numbers if n is not None)
        found[mangled] = (registers, stack, spills)
    return found


def _disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    listing = subprocess.run(
        [str(find_nvdisasm()), "-c", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    kernels: dict[str, list[Instruction]] = {}
    for section in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
        lines = section.splitlines()
        texts: list[str] = []
        labels: dict[str, int] = {}
        for line in lines[1:]:
            if line.lstrip().startswith(".section"):
                break
            label = re.match(r"(\.L_x_\d+):", line)
            code = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
            if label:
                labels[label[1]] = len(texts)
            elif code and code[1] != "NOP":
                texts.append(code[1])
        kernels[lines[0].rstrip(":")] = [_instruction(t, labels.__getitem__) for t in texts]
    return kernels


def _instruction(text: str, position: Callable[[str], int]) -> Instruction:
    predicate = re.match(r"@!?U?P\w+\s+", text)
    opcode = text[predicate.end() if predicate else 0 :].split()[0]
    # A branch on a uniform predicate has it among its operands.
    is_predicated = predicate is not None or re.search(r"\bU?P\d", text) is not None
    label = _LABEL.search(text) if opcode.split(".")[0] == "BRA" else None
    assert not opcode.startswith(("BRX", "JMX")), text
    target = None if label is None else position(label[1])
    return Instruction("BRA" if label else opcode, text, is_predicated, target)
