#!/usr/bin/env bash
# Builds mezo_kernels._C with nvcc and g++ alone, for hosts without cmake, ninja or pybind11:
# pybind11's headers come with torch. The flags are those of CMakeLists.txt.
#
#   bench/build_plain.sh        from anywhere; PYTHON, NVCC and MEZO_CUDA_ARCHS override
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
read -r -a archs <<<"${MEZO_CUDA_ARCHS:-80 90}"
work=build/plain
mkdir -p "$work"

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
  "-I$python_include" "-I$pybind_include")
info=(-DMEZO_CUDA "-DMEZO_CUDA_ARCHS=\"${archs[*]}\"" "-DMEZO_COMPILER=\"g++ $(g++ -dumpversion)\"")
x86=()
[ "$(uname -m)" = x86_64 ] && x86=(-DMEZO_X86)
avx2=(-mavx2 -mfma -mf16c)
avx512=(-mavx512f -mavx512dq -mavx512bw -mavx512vl "${avx2[@]}" -mprefer-vector-width=512)
gencode=()
for arch in "${archs[@]}"; do
  gencode+=("-gencode=arch=compute_$arch,code=sm_$arch")
done
gencode+=("-gencode=arch=compute_${archs[-1]},code=compute_${archs[-1]}")

objects=()
pids=()
compile() { # object, command ...
  local object=$work/$1.o
  shift
  objects+=("$object")
  "$@" -c -o "$object" &
  pids+=($!)
}
compile bindings "${cxx[@]}" "${info[@]}" "${x86[@]}" csrc/bindings.cpp
compile bindings_cuda "${cxx[@]}" csrc/bindings_cuda.cpp
for name in dispatch launch lora portable; do
  compile "$name" "${cxx[@]}" "${x86[@]}" "csrc/cpu/$name.cpp"
done
if [ ${#x86[@]} -gt 0 ]; then
  compile avx2 "${cxx[@]}" "${x86[@]}" "${avx2[@]}" csrc/cpu/avx2.cpp
  compile avx512 "${cxx[@]}" "${x86[@]}" "${avx512[@]}" csrc/cpu/avx512.cpp
fi
for source in csrc/cuda/*.cu; do
  compile "cuda_$(basename "$source" .cu)" "$nvcc" -std=c++17 -O3 -DNDEBUG -fmad=false \
    "${gencode[@]}" -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off "$source"
done
for pid in "${pids[@]}"; do
  wait "$pid"
done
"$nvcc" -shared -cudart static -Xcompiler=-fopenmp "${objects[@]}" -o "mezo_kernels/_C$suffix"
echo "build_plain: mezo_kernels/_C$suffix for sm ${archs[*]}"
