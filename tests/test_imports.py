"""The import rules between packages, by ast, and what importing the kernels may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mezo_kernels

ROOT = Path(__file__).parents[1]
SGLANG_ROOM = ROOT / "mezo" / "engines" / "sglang"


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> list[str]:
    """Absolute dotted names that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *([node.module] if node.module else [])))
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules("mezo_kernels"), ids=relative)
def test_kernels_import_neither_mezo_nor_sglang(path):
    roots = {name.split(".")[0] for name in imported_names(path)}
    assert not roots & {"mezo", "sglang"}


@pytest.mark.parametrize(
    "path", [p for p in modules("mezo") if SGLANG_ROOM not in p.parents], ids=relative
)
def test_only_mezo_engines_sglang_imports_sglang(path):
    assert "sglang" not in {name.split(".")[0] for name in imported_names(path)}


@pytest.mark.parametrize("path", modules("mezo"), ids=relative)
def test_mezo_uses_public_names_of_the_kernels(path):
    used = {name for name in imported_names(path) if name.split(".")[0] == "mezo_kernels"}
    public = {f"mezo_kernels.{name}" for name in mezo_kernels.__all__} | {"mezo_kernels"}
    assert used <= public


def test_rules_see_the_packages():
    assert len(modules("mezo_kernels")) > 5


def test_importing_the_kernels_touches_no_gpu_and_compiles_nothing():
    code = (
        "import sys, torch, mezo_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
