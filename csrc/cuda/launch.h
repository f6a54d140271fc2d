// Entry points of the CUDA backend. `tensors` is a host table; all addresses inside it, and all
// other pointers, are device addresses. Each returns nullptr or the CUDA error as text.
#pragma once

#include "../table.h"

namespace mezo {

struct CudaTarget {
  int device;
  void* stream;
};

const char* cuda_sample(float* out, const TensorRow& tensor, const DirectionRow* direction,
                        const CudaTarget& target);

const char* cuda_add_directions(const TensorRow* tensors, int64_t num_tensors,
                                const Combination& sum, const CudaTarget& target);

const char* cuda_perturb(const TensorRow* masters, int64_t num_tensors, const Combination& update,
                         const FanOut& slots, const CudaTarget& target);

}  // namespace mezo
