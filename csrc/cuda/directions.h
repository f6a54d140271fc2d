// Directions on CUDA devices: sample, add_directions_ and perturb_into. All addresses are device
// addresses, unless a comment says otherwise. Nothing here allocates or waits; each call returns
// nullptr or the CUDA error as text.
#pragma once

#include <vector>

#include "step.h"
#include "table.h"
#include "target.h"

namespace mezo {

// The static tables of a plan (mezo_kernels/plan.py, DeviceTables).
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

const char* cuda_sample(float* out, const TensorRow& tensor, const DirectionRow& direction,
                        const CudaTarget& target);

const char* cuda_add_directions(const CudaTables& tables, const CudaScalars& scalars,
                                const CommonSeed& seed, const CudaTarget& target);

// indices (host): for each slot which direction of the slots it takes, or -1 for none.
const char* cuda_perturb(const CudaTables& tables, const CudaScalars& scalars,
                         const CommonSeed& seed, const std::vector<int64_t>& indices,
                         const CudaTarget& target);

const char* cuda_advance(const StepState& state, const CudaTarget& target);

// Columns of x that the first half of perturbed_lora adds up at once.
constexpr int kLoraSplit = 512;

// perturbed_lora (mezo_kernels/lora/cuda.py). x, h and y are fp16 or bf16, as x.dtype says; h is
// [num_rows, rank], partials fp32 [num_splits, num_rows, rank], both contiguous.
struct LoraCall {
  TensorRow a, b;
  OutputRow x, y;
  int64_t h, partials;
  const LoraPair* pairs;
  const DirectionRow* directions;
  const float* scales;
  int64_t num_rows;
  uint32_t num_pairs, num_splits;
  // How many blocks share the rows of a pair.
  uint32_t shrink_chunks, expand_chunks;
  float scaling;
  bool is_added;
};

const char* cuda_shrink(const LoraCall& call, const CommonSeed& seed, const CudaTarget& target);

const char* cuda_expand(const LoraCall& call, const CommonSeed& seed, const CudaTarget& target);

// Gaussians of given words, for tests.
const char* cuda_normals_of_words(float* z, const uint32_t* words, int64_t num_groups,
                                  const CudaTarget& target);

}  // namespace mezo
