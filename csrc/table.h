// Rows of the static tables that Python builds (mezo_kernels/plan.py) and every backend reads.
// All fields are 64 bits wide, so that a row is a row of an int64 tensor.
#pragma once

#include <stdint.h>

#include "philox.h"

namespace mezo {

enum DType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kNumDTypes = 3 };

// A tensor, or the shard of one, and its place in the whole tensor.
struct TensorRow {
  int64_t data;  // address
  int64_t row_stride;
  int64_t dtype;
  int64_t rows, cols;
  int64_t uid;
  int64_t row0, col0, global_cols;
};

// The same elements somewhere else: a slot.
struct OutputRow {
  int64_t data;
  int64_t row_stride;
  int64_t dtype;
};

struct DirectionRow {
  int64_t key0, key1, step, tail;
};

MEZO_HD Stream stream_of(const DirectionRow& direction, int64_t uid) {
  return {static_cast<uint32_t>(direction.key0), static_cast<uint32_t>(direction.key1),
          static_cast<uint32_t>(uid), static_cast<uint32_t>(direction.step),
          static_cast<uint32_t>(direction.tail)};
}

// A list of directions with one factor each: coefficients of a sum.
struct Combination {
  const DirectionRow* directions;
  const float* coefficients;
  int64_t size;
};

// Slots to write from the masters: slot k = master + scales[k] * z(directions[indices[k]]), or the
// master alone where the index is negative. outputs has num_slots x num_tensors rows.
struct FanOut {
  const DirectionRow* directions;
  int64_t num_directions;
  const int64_t* indices;
  const float* scales;
  const OutputRow* outputs;
  int64_t num_slots;
};

}  // namespace mezo
