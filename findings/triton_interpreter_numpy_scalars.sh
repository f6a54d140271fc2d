#!/usr/bin/env bash
# Triton 3.6.0's interpreter (TRITON_INTERPRET=1) cannot run a loop over a bound that is a kernel
# argument when NumPy is 2.4.6. The same kernel runs with NumPy 2.3.5, and Triton 3.7.1 runs it with
# NumPy 2.4.6. NumPy 2.4 turned the conversion of one-element arrays to Python scalars, deprecated
# since 1.25, into an error, and Triton 3.6.0 converts a kernel argument in that way.
#
# Who meets this: who tests kernels on a host without a GPU. Triton's wheel declares no dependency on
# NumPy, so a fresh environment gets the pair that does not work.
#
#   findings/triton_interpreter_numpy_scalars.sh      prints what each pair says; fails if that changes
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
${PYTHON:-python3} -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

cat >"$work/kernel.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def sum_rows(x, out, n):
    total = 0.0
    for i in range(n):
        total += tl.load(x + i)
    tl.store(out, total)


out = torch.zeros(1)
try:
    sum_rows[(1,)](torch.ones(4), out, 4)
    print("sum", out.item())
except Exception as error:
    print(type(error).__name__, str(error))
PY

say() { # triton, numpy
  pip "triton==$1" "numpy==$2"
  echo "triton $1, numpy $2: $(TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore "$work/kernel.py")"
}
pip torch==2.13.0
{
  say 3.6.0 2.3.5
  say 3.6.0 2.4.6
  say 3.7.1 2.4.6
} | tee "$work/seen"

diff "$work/seen" - <<'SEEN' || { echo "seen something else than in November 2026" >&2; exit 1; }
triton 3.6.0, numpy 2.3.5: sum 4.0
triton 3.6.0, numpy 2.4.6: InterpreterError TypeError('only 0-dimensional arrays can be converted to Python scalars')
triton 3.7.1, numpy 2.4.6: sum 4.0
SEEN
echo "as in November 2026"
