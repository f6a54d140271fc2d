#!/usr/bin/env bash
# A MeZO step end to end on a bare, offline GPU box: installs SGLang from a folder of wheels, builds
# the module and runs bench.e2e, then, in the time that is left, bench.paired with SGLang's kernels
# for attention (paired_sglang.*). Ends inside ten minutes; what there was no time for is named.
#
#   bench/gpu/e2e.sh WHEELS [OUT] [arguments of bench.e2e ...]
#   bench/gpu/e2e.sh --dry-run          the cases, on any host
#
# WHEELS holds SGLang 0.5.17 and what it needs as wheels for this Python, and, if the box needs one,
# shim_gpu.tgz: a folder shim_gpu that goes in front of PYTHONPATH (a stub of FlashInfer, say).
# PYTHON overrides the interpreter; it must have torch, transformers and nvcc's toolkit beside it.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

if [ "${1:-}" = --dry-run ]; then
  exec "$python" -m bench.e2e --dry-run
fi
wheels=${1:?usage: bench/gpu/e2e.sh WHEELS [OUT] [arguments ...]}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || {
  echo "e2e: needs a CUDA device that torch sees, found none; try --dry-run." >&2
  exit 2
}
out=${2:-${OUT:-bench/results/$device}}
shift $(($# > 1 ? 2 : 1))

# The box's own packages stay as they are: SGLang and its needs go into a folder in front of them.
site=${TMPDIR:-/tmp}/mezo-gpu-e2e
mkdir -p "$site"
"$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
export PYTHONPATH=$site
if [ -f "$wheels/shim_gpu.tgz" ]; then
  tar -C "$site" -xzf "$wheels/shim_gpu.tgz"
  export PYTHONPATH=$site/shim_gpu:$site
fi
# The entry point of our plugin comes with the package's metadata.
"$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .

export SGLANG_IS_FLASHINFER_AVAILABLE=false HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH=$PATH:$CUDA_HOME/bin PYTHONUNBUFFERED=1
status=0
"$python" -m bench.e2e --out "$out" --budget $((540 - SECONDS)) "$@" || status=$?
left=$((590 - SECONDS))
if [ "$left" -ge 60 ]; then
  timeout --kill-after=5 "$left" "$python" -m bench.paired --out "$out" --name paired_sglang \
    --budget $((left - 30)) || status=$?
else
  echo "e2e: $left s are left; bench.paired needs 60 and is left out."
fi
exit "$status"
