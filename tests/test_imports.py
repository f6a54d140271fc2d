"""Which room may import which, by ast, and what importing the kernels may do.

The rooms and their order are the table in docs/design/index.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mezo_kernels
import mezo_kernels.cpu
from tests.support.source import ROOT, Import, imports_of, python_files, relative, writes_of

ENGINES = "mezo/engines"
SGLANG = f"{ENGINES}/sglang"

# What a room may not import, wherever in a file, and why.
FORBIDDEN = {
    "mezo_kernels": (
        ["mezo", "sglang", "transformers", "peft", "bench", "tests", "examples"],
        "the kernels serve any code on tensors",
    ),
    "mezo": (["bench", "tests", "examples"], "they use the product, not the other way round"),
    "mezo/core": (
        ["transformers", "sglang", "typer", "safetensors"]
        + [
            f"mezo.{room}"
            for room in ("data", "tasks", "train", "cli", "engines", "checkpoint", "replicas")
        ]
        + ["mezo.run", "mezo.diagnostics"],
        "core speaks token rows and scalars only, so that every engine uses it as it is",
    ),
    "mezo/optim": (
        ["torch", "numpy", "transformers", "sglang", "mezo.core", "mezo.engines", "mezo.data"],
        "estimators and optimisers work on scalars",
    ),
    "mezo/objectives": (
        ["torch", "transformers", "sglang", "mezo.engines", "mezo.train", "mezo.run"],
        "an objective turns scores into a loss, whatever engine made them",
    ),
    "mezo/data": (
        ["sglang", "mezo.engines", "mezo.train", "mezo.run", "mezo.tasks"],
        "data makes token rows, whoever runs them",
    ),
    "mezo/cli": (
        ["torch", "transformers", "sglang", "mezo_kernels", "mezo.engines.sglang"],
        "a verb turns arguments into one call",
    ),
}

# Names of a room above its own that a file imports when a function runs, and why.
LATE_UPWARDS = {
    ("mezo/run.py", "mezo.diagnostics.comparison.warn_of_difference"): "it uses runs itself",
    ("mezo/train/run_files.py", "mezo.__version__"): "summaries say it",
    ("mezo/train/recorder.py", "mezo.__version__"): "trajectories say it",
    ("mezo/diagnostics/doctor.py", "mezo.__version__"): "its first line",
    ("mezo/engines/sglang/engine.py", "mezo.train.finetune.finetune"): "sglang.mezo_finetune",
}

# Files outside mezo/engines that name an engine's module, and why.
NAMES_AN_ENGINE = {
    "mezo/__init__.py": "mezo.launch_engine is SGLang's",
    "mezo/diagnostics/comparison.py": "the transformers engine is the reference",
}

# Files outside mezo/checkpoint that write to the disk, and why.
WRITERS = {
    "mezo/tasks/assets.py": "the cache of downloaded models and data, outside of any run",
    "mezo/engines/sglang/session.py": "hands weights over in a file that it deletes",
    "mezo/engines/sglang/worker.py": "hands weights over in a file that the caller deletes",
    "mezo/train/plots.py": "draws into memory; checkpoint writes the file",
    "mezo/engines/sglang/cpu_host/spawn.py": "a file that tells whether a process has started",
}


def rooms() -> list[str]:
    """The rooms from the top to the bottom, as docs/design/index.md has them."""
    text = (ROOT / "docs" / "design" / "index.md").read_text(encoding="utf-8")
    table = text.split("<!-- rooms: begin -->")[1].split("<!-- rooms: end -->")[0]
    return [path.rstrip("/") for path in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)]


def room_of(path: str) -> str:
    """The room that a file or a module's path is in: the longest one that names it."""
    found = [room for room in rooms() if f"{path}/".startswith(f"{room}/")]
    assert found, f"{path} is in no room of docs/design/index.md; add it there"
    return max(found, key=len)


def module_path(name: str) -> str | None:
    """The file of a dotted name of ours, or of the module that has it; None for other packages."""
    parts = name.split(".")
    if parts[0] not in ("mezo", "mezo_kernels"):
        return None
    for size in range(len(parts), 0, -1):
        path = "/".join(parts[:size])
        if (ROOT / f"{path}.py").exists():
            return f"{path}.py"
        if (ROOT / path / "__init__.py").exists():
            return f"{path}/__init__.py"
    raise AssertionError(f"no module of ours: {name}")


def by_name(path: Path) -> list[Import]:
    return [found for found in imports_of(path) if not found.is_for_types]


def files(*folders: str):
    return pytest.mark.parametrize("path", python_files(*folders), ids=relative)


@files("mezo")
def test_a_room_imports_only_rooms_below_it(path):
    order = rooms()
    own = room_of(relative(path))
    wrong = []
    for found in by_name(path):
        target = module_path(found.name)
        if target is None or target.startswith("mezo_kernels"):
            continue
        is_upwards = order.index(room_of(target)) < order.index(own)
        is_late = found.is_late and (relative(path), found.name) in LATE_UPWARDS
        if is_upwards and not is_late:
            wrong.append(f"line {found.line}: {found.name}")
    assert not wrong, f"{own} imports what is above it in docs/design/index.md"


def test_each_exception_is_there():
    for file, name in LATE_UPWARDS:
        assert name in {found.name for found in by_name(ROOT / file)}, file
    for file in NAMES_AN_ENGINE:
        assert engines_named_in(ROOT / file), file


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_room_keeps_to_its_subject(folder):
    names, why = FORBIDDEN[folder]
    wrong = [
        f"{relative(path)}:{found.line}: {found.name}"
        for path in python_files(folder)
        for found in imports_of(path)
        for name in names
        if found.is_in(name)
    ]
    assert not wrong, why


@files("mezo", "mezo_kernels", "bench", "examples")
def test_only_mezo_engines_sglang_imports_sglang(path):
    is_inside = relative(path).startswith(f"{SGLANG}/")
    is_bench = relative(path).startswith("bench/")  # measures SGLang's own kernels beside ours
    assert is_inside or is_bench or "sglang" not in {found.root for found in imports_of(path)}


def engines_named_in(path: Path) -> list[str]:
    """The names of engines' own modules that a file outside of the engines imports."""
    if relative(path).startswith(f"{ENGINES}/"):
        return []
    modules = ("mezo.engines.sglang", "mezo.engines.transformers")
    return [found.name for found in by_name(path) for name in modules if found.is_in(name)]


@files("mezo")
def test_engines_are_named_by_the_registry_only(path):
    assert relative(path) in NAMES_AN_ENGINE or not engines_named_in(path)


@files("mezo")
def test_mezo_uses_public_names_of_the_kernels(path):
    used = {found.name for found in imports_of(path) if found.root == "mezo_kernels"}
    public = {"mezo_kernels", "mezo_kernels.cpu"}
    for module in (mezo_kernels, mezo_kernels.cpu):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert used <= public


@files("mezo")
def test_only_the_state_writes_adapter_slots(path):
    writers = {"mezo_kernels.perturb_into", "mezo_kernels.add_directions_"}
    if relative(path) == "mezo/core/state.py":
        return
    if relative(path) == "mezo/checkpoint/replay.py":  # into tensors of its own, without slots
        writers.remove("mezo_kernels.add_directions_")
    assert not [f.name for f in imports_of(path) if f.name in writers]


@files("mezo/cli")
def test_the_command_line_imports_typer_and_mezo_only(path):
    others = {found.root for found in imports_of(path)} - set(sys.stdlib_module_names)
    assert others <= {"typer", "mezo"}


@files("mezo")
def test_checkpoint_is_the_only_room_that_writes_to_the_disk(path):
    if relative(path).startswith("mezo/checkpoint/"):
        return
    found = writes_of(path)
    if relative(path) in WRITERS:
        assert found, f"{relative(path)} writes nothing any more; take it off the list"
    else:
        assert not found


@files("mezo_kernels")
def test_the_kernels_need_torch_and_triton_only(path):
    others = {found.root for found in imports_of(path)} - set(sys.stdlib_module_names)
    assert others <= {"torch", "triton", "mezo_kernels"}


@pytest.mark.parametrize("package", ["mezo", "mezo_kernels"])
def test_no_modules_import_one_another(package):
    """At module level; a room's `__init__` counts as a module of its own."""
    imported = {}
    for path in python_files(package):
        targets = [module_path(found.name) for found in by_name(path) if not found.is_late]
        imported[relative(path)] = {target for target in targets if target} - {relative(path)}
    # Take away what imports nothing that is left; a circle stays.
    while free := [file for file, targets in imported.items() if not targets & imported.keys()]:
        for file in free:
            del imported[file]
    assert not imported


def test_every_room_is_there():
    for room in rooms():
        assert (ROOT / room).exists(), room


def test_rules_see_the_packages():
    assert len(python_files("mezo_kernels")) > 5
    assert len(python_files("mezo")) > 50
    assert all(python_files(folder) for folder in FORBIDDEN)


def test_importing_the_kernels_touches_no_gpu_and_compiles_nothing():
    code = (
        "import sys, torch, mezo_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
