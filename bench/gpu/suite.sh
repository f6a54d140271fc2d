#!/usr/bin/env bash
# Everything a GPU has to show, in one command and under ten minutes: builds the module, runs the
# tests that need a GPU, compute-sanitizer, bench.directions, bench.paired and the benchmark of
# perturbed_lora. Needs no network, no SGLang and no package of mezo/. Exits with 1 when any part
# failed.
#
#   bench/gpu/suite.sh [OUT]    OUT, else $OUT, else bench/results/<device>; PYTHON overrides
set -uo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
PATH=$PATH:/usr/local/cuda/bin
limit_s=585
device=$($python -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || {
  echo "suite: needs a CUDA device that torch sees, found none." >&2
  exit 2
}
out=${1:-${OUT:-bench/results/$device}}
mkdir -p "$out"
failed=0
: >"$out/suite.tsv"

part() { # name, seconds, command ...
  local name=$1 seconds=$2 left=$((limit_s - SECONDS)) start=$SECONDS status=0
  shift 2
  [ "$seconds" -gt "$left" ] && seconds=$left
  if [ "$seconds" -lt 5 ]; then
    status="no time left"
  else
    echo "== $name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
    status=${PIPESTATUS[0]}
  fi
  [ "$status" = 0 ] || failed=1
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$out/suite.tsv"
}

build() {
  if command -v cmake >/dev/null && command -v ninja >/dev/null &&
    $python -c 'import pybind11, setuptools' 2>/dev/null; then
    MEZO_BUILD_EXPERIMENTS=1 $python setup.py -q build_ext --inplace && return
    echo "setup.py failed; building with nvcc and g++ only"
  fi
  PYTHON=$python bench/build_plain.sh --experiments
}

# tests/conftest.py imports mezo and so transformers: only conftests below the confcutdir are read.
tests=($python -m pytest -q -p no:cacheprovider -W default
  -o "addopts=-ra --strict-markers --import-mode=importlib")
of_kernels=(--confcutdir=tests/kernels tests/kernels)
of_experiments=(--confcutdir=tests/bench tests/bench/experiments)
# pytest wants the expression on one line.
small="not on_host and not triton and (test_slots_of_sglang or test_steps_on_each_device_backend"
small+=" or several_directions)"

export -f build
export python
part build 200 bash -c build
# Without it every test would be skipped, and a suite of skipped tests would pass.
part usable 60 $python -c '
import mezo_kernels
from bench.experiments import _native
reasons = mezo_kernels.backends()
print(reasons)
raise SystemExit(reasons["cpu"] or reasons["cuda"] or _native.reason_against_cuda())'
part tests 180 "${tests[@]}" -m gpu "${of_kernels[@]}"
part experiments 60 "${tests[@]}" -m "gpu and not sglang" "${of_experiments[@]}"
if command -v compute-sanitizer >/dev/null; then
  sanitized=("${tests[@]}" -m "gpu and not slow and not sglang" -k "$small")
  for tool in memcheck racecheck; do
    checked=(compute-sanitizer --tool "$tool" --error-exitcode 9 "${sanitized[@]}")
    part "$tool" 40 "${checked[@]}" --confcutdir=tests/kernels tests/kernels/directions/test_cuda.py
    part "${tool}_experiments" 20 "${checked[@]}" "${of_experiments[@]}"
  done
else
  echo "suite: compute-sanitizer is not on PATH; memcheck and racecheck are left out."
fi
part directions 130 $python -m bench.directions --device cuda --out "$out" --budget 110
# Without SGLang and FlashInfer their attention kernels are left out, which the table says.
part paired 100 $python -m bench.paired --device cuda --out "$out" --budget 75
left=$((limit_s - SECONDS - 30))
part perturbed_lora $((left + 20)) $python -m bench.experiments.lora.measure --device cuda \
  --rounds 10 --out "$out" --budget "$left"

$python - "$out" <<'PY'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
lines = [line.split("\t") for line in (out / "suite.tsv").read_text().splitlines()]
parts = [{"part": name, "status": status, "seconds": int(s)} for name, status, s in lines]
(out / "suite.json").write_text(json.dumps(parts, indent=1) + "\n")
(out / "suite.tsv").unlink()
for part in parts:
    said = "ok" if part["status"] == "0" else f"FAILED ({part['status']})"
    print(f"{part['part']:<12} {said:<24} {part['seconds']} s")
measured = out / "directions.json"
if measured.exists():
    for row in json.loads(measured.read_text())["rows"]:
        if "fail" in row:
            print(f"{row['case']:<36} {row['path']:<28} FAIL: {row['fail']}")
            continue
        share = f"{row['percent_of_copy']} % of copy" if "percent_of_copy" in row else ""
        time = f"{row['p50_us']:>10} us  x{row['ratio']:<7}"
        print(f"{row['case']:<36} {row['path']:<28} {time} {share}")
PY
exit "$failed"
