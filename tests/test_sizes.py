"""Files and functions stay short enough to be read in one go."""

from __future__ import annotations

from tests.support.source import ROOT, functions_of, python_files, relative

# A file aims below 400 lines. These are longer, and why.
LONG_FILES: dict[str, str] = {
    "tests/engines/sglang/test_adapter_files.py": "one case for every field of adapter_config.json",
    "tests/kernels/attention/test_shared_prefix_attention.py": "one contract, four backends",
    "tests/mezo/data/test_texts.py": "one case for every way to join texts",
    "tests/mezo/train/test_saving.py": "one case for everything that ends a training",
}
LONG_FUNCTIONS: dict[str, str] = {
    "mezo_kernels/attention/triton/kernel.py:shared_prefix_kernel": "one Triton kernel",
}
PYTHON = python_files("mezo", "mezo_kernels", "bench", "tests", "examples")
NATIVE = [path for end in ("cpp", "cu", "h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{end}")]


def test_a_file_has_at_most_500_lines_and_above_400_a_reason():
    sizes = {relative(path): len(path.read_text("utf-8").splitlines()) for path in PYTHON + NATIVE}
    assert len(sizes) > 100
    assert not {name: size for name, size in sizes.items() if size > 500}
    assert {name for name, size in sizes.items() if size > 400} <= set(LONG_FILES)


def test_a_function_has_at_most_100_lines():
    sizes = {
        f"{relative(path)}:{name}": lines for path in PYTHON for name, lines in functions_of(path)
    }
    assert {name for name, size in sizes.items() if size > 100} <= set(LONG_FUNCTIONS)


def test_exceptions_name_files_that_are_there():
    for name in [*LONG_FILES, *LONG_FUNCTIONS]:
        assert (ROOT / name.split(":")[0]).exists(), name
