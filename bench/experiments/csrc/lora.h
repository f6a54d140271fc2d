// perturbed_lora on CUDA devices (bench/experiments/lora/cuda.py): what a call asks for.
#pragma once

#include "cuda/target.h"
#include "table.h"

namespace mezo {

// Two copies of an adapter with one direction: rows first[i] .. last[i] - 1 of x use copy i, which
// has scale scales[i]. No direction (-1): both are the master itself. No rows: there is no copy 1.
struct alignas(16) LoraPair {
  int32_t direction, scales[2], first[2], last[2], reserved;
};

// Columns of x that shrink adds up at once.
constexpr int kLoraSplit = 512;

// x, h and y are fp16 or bf16, as x.dtype says; h is [num_rows, rank], partials fp32
// [num_splits, num_rows, rank], both contiguous. All addresses are device addresses.
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

// The two halves. Each returns nullptr or the CUDA error as text.
const char* cuda_shrink(const LoraCall& call, const CommonSeed& seed, const CudaTarget& target);

const char* cuda_expand(const LoraCall& call, const CommonSeed& seed, const CudaTarget& target);

}  // namespace mezo
