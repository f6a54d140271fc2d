// What the bindings of CUDA kernels share.
#pragma once

#include <stdint.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cuda/target.h"

namespace mezo {

// (domain or -1, key low, key high)
using SeedFields = std::array<int64_t, 3>;

inline CudaTarget target_of(int device, int64_t stream) {
  return {device, reinterpret_cast<void*>(stream)};
}

inline void raise_on(const char* function, const char* error) {
  if (error == nullptr) return;
  throw std::runtime_error(std::string(function) + ": the CUDA launch failed with '" + error +
                           "'; run with CUDA_LAUNCH_BLOCKING=1 to find the call that broke.");
}

inline CommonSeed seed_of(const SeedFields& s) {
  return {s[0], static_cast<uint32_t>(s[1]), static_cast<uint32_t>(s[2])};
}

}  // namespace mezo
