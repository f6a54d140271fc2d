// Rows of the static tables that Python builds (mezo_kernels/directions/plan.py) and every backend
// reads. All fields are 64 bits wide, so that a row is a row of an int64 tensor.
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

// Elements of an entry of the work list of a GPU, and of what one of its threads handles at once.
constexpr int kWorkBlock = 2048;
constexpr int kVector = 8;

// What the vector path needs of a tensor's shape and place, counted in vectors of kVector elements.
// Vector i lies in row umulhi(2 i, multiplier) >> shift, which is i / cols.
struct VectorRow {
  uint32_t uid, num_vectors, cols, global_cols, first;
  uint32_t multiplier, shift, reserved;
};

// Entry of the work list: positions kWorkBlock * block ... of a tensor.
struct Work {
  uint32_t tensor, block;
};

struct DirectionRow {
  int64_t key0, key1, step, tail;
};

MEZO_HD Stream stream_of(const DirectionRow& direction, int64_t uid) {
  return {static_cast<uint32_t>(direction.key0), static_cast<uint32_t>(direction.key1),
          static_cast<uint32_t>(uid), static_cast<uint32_t>(direction.step),
          static_cast<uint32_t>(direction.tail)};
}

// The lines of a tensor: runs that are contiguous in the element index e. A shard with full rows is
// one line, any other has a line per row.
struct Lines {
  int64_t count, length, first_element, element_stride;
};

MEZO_HD Lines lines_of(const TensorRow& t) {
  const bool is_whole = t.cols == t.global_cols;
  const int64_t count = is_whole ? 1 : t.rows;
  const int64_t length = is_whole ? t.rows * t.cols : t.cols;
  return {length == 0 ? 0 : count, length, t.row0 * t.global_cols + t.col0, t.global_cols};
}

// A list of directions with one factor each: coefficients of a sum.
struct Combination {
  const DirectionRow* directions;
  const float* coefficients;
  int64_t size;
};

// Slots to write from the masters: slot k = master + scales[k] * z(directions[indices[k]]), or the
// plain master where the index is negative. outputs has num_slots x num_tensors rows.
struct FanOut {
  const DirectionRow* directions;
  int64_t num_directions;
  const int64_t* indices;
  const float* scales;
  const OutputRow* outputs;
  int64_t num_slots;
};

}  // namespace mezo
