// What every launch on a CUDA device needs.
#pragma once

#include <stdint.h>

namespace mezo {

struct CudaTarget {
  int device;
  void* stream;
};

// What all directions have in common: nothing where domain is negative.
struct CommonSeed {
  int64_t domain;
  uint32_t key0, key1;
};

}  // namespace mezo
