// How a thread comes to z: kinds of directions, known at compile time where a call has only one.
//
// A Draw has a Row, what it needs of a DirectionRow in registers, and gives z of four elements
// (one group) or of eight (a vector, beginning at an even group). kBlocksPerSm blocks of kThreads
// threads leave each thread 64 or 96 registers.
#pragma once

#include "table.h"

namespace mezo {
namespace {

// The words of a DirectionRow that count are the low halves of its fields.
struct alignas(16) LowHigh {
  uint32_t low0, high0, low1, high1;
};

struct CounterRow {
  uint32_t step, tail;
};

__device__ __forceinline__ CounterRow load_counter(const DirectionRow* row) {
  const LowHigh words = *reinterpret_cast<const LowHigh*>(&row->step);
  return {words.low0, words.low1};
}

// Gaussian directions with one seed: the key schedule lies in constant memory.
struct GaussianDraw {
  RoundKeys keys;
  using Row = CounterRow;
  static constexpr int kBlocksPerSm = 8;

  __device__ __forceinline__ Row load_row(const DirectionRow* row) const {
    return load_counter(row);
  }
  __device__ __forceinline__ void four(const Row& row, uint32_t uid, uint32_t group,
                                       float z[4]) const {
    uint32_t words[4];
    philox(keys, group, uid, row.step, row.tail, words);
    gaussian_of_words(words, z);
  }
  __device__ __forceinline__ void eight(const Row& row, uint32_t uid, uint32_t group,
                                        float z[8]) const {
    four(row, uid, group, z);
    four(row, uid, group + 1, z + 4);
  }
};

// Rademacher directions with one seed: one Philox call gives a thread all its signs.
struct RademacherDraw {
  RoundKeys keys;
  using Row = CounterRow;
  static constexpr int kBlocksPerSm = 8;

  __device__ __forceinline__ Row load_row(const DirectionRow* row) const {
    return load_counter(row);
  }
  __device__ __forceinline__ void four(const Row& row, uint32_t uid, uint32_t group,
                                       float z[4]) const {
    signs<4>(row, uid, group, z);
  }
  __device__ __forceinline__ void eight(const Row& row, uint32_t uid, uint32_t group,
                                        float z[8]) const {
    signs<8>(row, uid, group, z);
  }

 private:
  template <int kSize>
  __device__ __forceinline__ void signs(const Row& row, uint32_t uid, uint32_t group,
                                        float z[kSize]) const {
    uint32_t words[4];
    philox(keys, group >> 5, uid, row.step, row.tail, words);
    const uint32_t element = group << 2;
    const uint32_t bits = sign_word(words, element) >> (element & 31u);
    for (uint32_t i = 0; i < kSize; ++i) z[i] = sign_of_bit(bits, i);
  }
};

// Any mixture of seeds and distributions.
struct AnyDraw {
  using Row = DirectionRow;
  static constexpr int kBlocksPerSm = 5;

  __device__ __forceinline__ Row load_row(const DirectionRow* row) const { return *row; }
  __device__ __forceinline__ void four(const Row& row, uint32_t uid, uint32_t group,
                                       float z[4]) const {
    direction_group(stream_of(row, uid), group, z);
  }
  __device__ __forceinline__ void eight(const Row& row, uint32_t uid, uint32_t group,
                                        float z[8]) const {
    four(row, uid, group, z);
    four(row, uid, group + 1, z + 4);
  }
};

}  // namespace
}  // namespace mezo
