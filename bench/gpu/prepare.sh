#!/usr/bin/env bash
# Collects what a GPU box without a network lacks, in a folder that goes there with the checkout:
# SGLang's wheels (bench/gpu/wheels.txt) and Triton kernels that are compiled already.
#
#   bench/gpu/prepare.sh [FOLDER]                   FOLDER: .whl if left out
#   bench/gpu/prepare.sh [FOLDER] --triton-cache    makes a Python 3.12 with the box's torch (5 GB)
#
# PYTHON overrides the interpreter that downloads, BOX_PYTHON is a Python 3.12 for the second form.
# A folder that is complete stays as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m bench.gpu.prepare "$@"
