#!/usr/bin/env bash
# Builds mezo_kernels._C with nvcc and g++ only, for hosts without cmake, ninja or pybind11:
# pybind11's headers come with torch. The sources are those of csrc/sources.txt, the flags those of
# CMakeLists.txt. Without nvcc the module has the CPU kernels only, and the last line says so.
#
#   bench/build_plain.sh [--experiments]      from anywhere
#
# --experiments also builds bench.experiments._C.
# PYTHON, NVCC and MEZO_CUDA_ARCHS override; MEZO_SKIP_CUDA_BUILD=1 leaves the CUDA kernels out.
set -euo pipefail
cd "$(dirname "$0")/.."

with_experiments=
for argument in "$@"; do
  if [ "$argument" != --experiments ]; then
    echo "build_plain: the only argument is --experiments, got '$argument'." >&2
    exit 2
  fi
  with_experiments=1
done
python=${PYTHON:-python3}
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
read -r -a archs <<<"${MEZO_CUDA_ARCHS:-80 90}"
without_cuda=
case ${MEZO_SKIP_CUDA_BUILD:-0} in
  0) [ -x "$nvcc" ] || without_cuda="there is no nvcc at $nvcc; install it or set NVCC" ;;
  *) without_cuda="MEZO_SKIP_CUDA_BUILD is set" ;;
esac

suffix=$($python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
python_include=$($python -c 'import sysconfig; print(sysconfig.get_path("include"))')
pybind_include=$($python - <<'PY'
try:
    import pybind11
    print(pybind11.get_include())
except ImportError:
    import torch
    from pathlib import Path
    print(Path(torch.__file__).parent / "include")
PY
)
if [ ! -e "$pybind_include/pybind11/pybind11.h" ]; then
  echo "build_plain: pybind11/pybind11.h must be in pybind11 or torch, got none in $pybind_include;" \
    "install pybind11." >&2
  exit 1
fi

cxx=(g++ -std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -ffp-contract=off -fopenmp -Icsrc
  "-I$python_include" "-I$pybind_include" "-DMEZO_COMPILER=\"g++ $(g++ -dumpversion)\"")
parts=" always "
if [ "$(uname -m)" = x86_64 ]; then
  parts+="x86 "
  cxx+=(-DMEZO_X86)
fi
cuda=("$nvcc" -std=c++17 -O3 -DNDEBUG -fmad=false -Icsrc
  -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off)
link=(g++ -shared -fopenmp)
if [ -z "$without_cuda" ]; then
  parts+="cuda "
  cxx+=(-DMEZO_CUDA "-DMEZO_CUDA_ARCHS=\"${archs[*]}\"")
  for arch in "${archs[@]}"; do
    cuda+=("-gencode=arch=compute_$arch,code=sm_$arch")
  done
  cuda+=("-gencode=arch=compute_${archs[-1]},code=compute_${archs[-1]}")
  link=("$nvcc" -shared -cudart static -Xcompiler=-fopenmp)
fi

build() { # list of sources, module
  local list=$1 module=$2$suffix objects=() pids=() part path flags object compiler
  while read -r part path flags; do
    [[ $part = "#"* || $parts != *" $part "* ]] && continue
    path=$(dirname "$list")/$path
    object=build/plain/$path.o
    mkdir -p "$(dirname "$object")"
    compiler=("${cxx[@]}")
    [[ $path = *.cu ]] && compiler=("${cuda[@]}")
    # The flags are words of their own.
    # shellcheck disable=SC2086
    "${compiler[@]}" $flags -c -o "$object" "$path" &
    objects+=("$object")
    pids+=($!)
  done <"$list"
  for pid in "${pids[@]}"; do
    wait "$pid"
  done
  "${link[@]}" "${objects[@]}" -o "$module"
  if [ -z "$without_cuda" ]; then
    echo "build_plain: $module for sm ${archs[*]}"
  else
    echo "build_plain: $module without the CUDA kernels: $without_cuda"
  fi
}

build csrc/sources.txt mezo_kernels/_C
if [ -n "$with_experiments" ]; then
  build bench/experiments/csrc/sources.txt bench/experiments/_C
fi

# A module that links may still lack a symbol.
"$python" -c 'import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]' \
  mezo_kernels._C ${with_experiments:+bench.experiments._C}
