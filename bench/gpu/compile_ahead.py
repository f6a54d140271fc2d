"""Compiles for sm_90, without a GPU, what the tests' launches ask of Triton, into its cache."""

from __future__ import annotations

import sys

import pytest

from bench.gpu.places import ROOT

# The launching code itself runs in these, on CPU tensors, up to the driver's call.
TESTS = ("tests/kernels/test_dry_launch.py",)


def main() -> int:
    options = [
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "--confcutdir=tests/kernels",
    ]
    options += ["-o", "addopts=--strict-markers --import-mode=importlib"]
    return pytest.main([*options, "--rootdir", str(ROOT), *TESTS])


if __name__ == "__main__":
    sys.exit(main())
