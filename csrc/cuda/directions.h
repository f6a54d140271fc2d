// Directions on CUDA devices: sample, add_directions_ and perturb_into. All addresses are device
// addresses, unless a comment says otherwise. Nothing here allocates or waits; each call returns
// nullptr or the CUDA error as text.
#pragma once

#include <vector>

#include "table.h"
#include "target.h"

namespace mezo {

// The static tables of a plan (mezo_kernels/directions/plan.py, DeviceTables).
struct CudaTables {
  const TensorRow* tensors;
  const VectorRow* vectors;
  const OutputRow* outputs;
  const Work* work;
  int64_t num_tensors, num_work, num_vector;
};

// What changes from call to call (mezo_kernels/directions/scalars.py, Scalars): the directions of
// the update and then those of the slots, the update's coefficients and then the slots' scales.
// num_updates[0], read on the device, is how many directions of the update count.
struct CudaScalars {
  const DirectionRow* directions;
  const float* factors;
  const int32_t* num_updates;
  int64_t max_updates;
};

// Which elements of a vector tensor a thread has (walk.cuh): vectors, or runs of half a vector.
enum class Lanes { kWide, kContiguous };

const char* cuda_sample(float* out, const TensorRow& tensor, const DirectionRow& direction,
                        const CudaTarget& target);

const char* cuda_add_directions(const CudaTables& tables, const CudaScalars& scalars,
                                const CommonSeed& seed, Lanes lanes, const CudaTarget& target);

// indices (host): for each slot which direction of the slots it uses, or -1 for none.
const char* cuda_perturb(const CudaTables& tables, const CudaScalars& scalars,
                         const CommonSeed& seed, const std::vector<int64_t>& indices, Lanes lanes,
                         const CudaTarget& target);

// Gaussians of given words, for tests.
const char* cuda_normals_of_words(float* z, const uint32_t* words, int64_t num_groups,
                                  const CudaTarget& target);

}  // namespace mezo
