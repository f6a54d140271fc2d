// Which elements a thread has: vectors of eight in tensors that allow it, else runs of four.
#pragma once

#include <type_traits>

#include "draw.cuh"
#include "directions.h"
#include "memory.cuh"

namespace mezo {
namespace {

constexpr int kThreads = 128;
constexpr int kVectorsPerThread = kWorkBlock / kVector / kThreads;

// Vectors v of a thread, v = 0 .. kVectorsPerThread - 1, coalesced over the threads.
//
// kRun is how many neighbours a lane has, kVector or half of it. With kVector a thread has whole
// vectors, and each of its two 16-byte accesses of fp32 leaves a gap of 16 bytes to the next lane's.
// With half of it, "vector" v of a thread is the same half of two vectors of the tensor, and each
// access is contiguous over the warp. A run has a row, a column and a group of its own: the second
// one may lie in another row, or nowhere.
template <int kRun>
struct VectorWalk {
  static_assert(kRun == kVector || kRun == kVector / 2, "a run is a vector or half of one");
  static constexpr int kRuns = kVector / kRun;

  VectorRow shape;
  uint32_t start;  // the tensor's vector with the first run
  uint32_t part;   // which run of the tensor's vectors this thread has

  __device__ __forceinline__ VectorWalk(const CudaTables& tables, const Work& work) {
    const uint4* row = reinterpret_cast<const uint4*>(tables.vectors + work.tensor);
    const uint4 parts[2] = {row[0], row[1]};
    memcpy(&shape, parts, sizeof shape);
    start = work.block * (kWorkBlock / kVector) + threadIdx.x / kRuns;
    part = threadIdx.x % kRuns;
  }
  // Whether a run of vector v exists; none does behind one that does not.
  __device__ __forceinline__ bool is_inside(int v, int run = 0) const {
    return vector(v, run) < shape.num_vectors;
  }
  // The first Philox group of each run; elements stay below 2^34, so groups are 32 bits wide.
  __device__ __forceinline__ void groups(int v, uint32_t group[kRuns]) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      group[r] = 2 * (shape.first + row(v, r) * shape.global_cols + col(v, r)) + part;
    }
  }
  // Leaves alone what does not exist.
  __device__ __forceinline__ void load(int64_t data, int64_t dtype, int64_t row_stride, int v,
                                       float values[kVector]) const {
    if (!is_inside(v)) return;
    if (dtype == kFloat32) {
      visit(data, sizeof(float), row_stride, v, [&](int first, int64_t address) {
        load_float32_run<kRun>(address, values + first);
      });
      return;
    }
    uint32_t words[kVector / 2] = {};
    visit(data, sizeof(uint16_t), row_stride, v, [&](int first, int64_t address) {
      load_word_run<kRun>(address, words + first / 2);
    });
    unpack_vector(dtype, words, values);
  }
  __device__ __forceinline__ void store(int64_t data, int64_t dtype, int64_t row_stride, int v,
                                        const float values[kVector]) const {
    if (!is_inside(v)) return;
    if (dtype == kFloat32) {
      visit(data, sizeof(float), row_stride, v, [&](int first, int64_t address) {
        store_float32_run<kRun>(address, values + first);
      });
      return;
    }
    uint32_t words[kVector / 2];
    pack_vector(dtype, values, words);
    visit(data, sizeof(uint16_t), row_stride, v, [&](int first, int64_t address) {
      store_word_run<kRun>(address, words + first / 2);
    });
  }

 private:
  // Calls body(first of the eight elements, address) for the runs of vector v that exist, of which
  // the first one does. A stride is below 2^32 vectors.
  template <class Body>
  __device__ __forceinline__ void visit(int64_t data, int element_bytes, int64_t row_stride, int v,
                                        Body&& body) const {
    const uint32_t stride = static_cast<uint32_t>(static_cast<uint64_t>(row_stride) / kVector);
    const int64_t mine = data + part * (kRun * element_bytes);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (r > 0 && !is_inside(v, r)) return;
      const uint64_t at = static_cast<uint64_t>(row(v, r)) * stride + col(v, r);
      body(r * kRun, mine + static_cast<int64_t>(at) * (kVector * element_bytes));
    }
  }
  __device__ __forceinline__ uint32_t vector(int v, int run) const {
    return start + (v * kRuns + run) * (kThreads / kRuns);
  }
  __device__ __forceinline__ uint32_t row(int v, int run) const {
    return __umulhi(vector(v, run) << 1, shape.multiplier) >> shape.shift;
  }
  __device__ __forceinline__ uint32_t col(int v, int run) const {
    return vector(v, run) - row(v, run) * shape.cols;
  }
};

// z of a vector whose runs begin at the given groups.
template <int kRun, class Draw>
__device__ __forceinline__ void draw_vector(const Draw& draw, const typename Draw::Row& row,
                                            uint32_t uid, const uint32_t group[kVector / kRun],
                                            float z[kVector]) {
  if constexpr (kRun == kVector) {
    draw.eight(row, uid, group[0], z);
  } else {
    draw.four(row, uid, group[0], z);
    draw.four(row, uid, group[1], z + kRun);
  }
}

// body(the kRun of a pattern, as a type).
template <class Body>
const char* with_lanes(Lanes lanes, Body&& body) {
  if (lanes == Lanes::kContiguous) return body(std::integral_constant<int, kVector / 2>{});
  return body(std::integral_constant<int, kVector>{});
}

// Four consecutive positions of a shard, any shape: each has its row, column and Philox group.
struct Quad {
  int64_t row, col, cols;
  int count;          // how many of the four exist
  uint32_t group[4];
  uint32_t lanes;     // two bits each: which normal of its group

  __device__ __forceinline__ Quad(const TensorRow& tensor, int64_t position) : cols(tensor.cols) {
    const int64_t size = tensor.rows * tensor.cols;
    const int64_t left = size - position;
    count = left < 4 ? static_cast<int>(left) : 4;
    if (size <= 0x7FFFFFFF) {
      row = static_cast<uint32_t>(position) / static_cast<uint32_t>(cols);
    } else {
      row = position / cols;
    }
    col = position - row * cols;
    lanes = 0;
    visit([&](int j, int64_t r, int64_t c) {
      const int64_t element = (tensor.row0 + r) * tensor.global_cols + tensor.col0 + c;
      group[j] = static_cast<uint32_t>(element >> 2);
      lanes |= static_cast<uint32_t>(element & 3) << (2 * j);
    });
  }

  // Calls body(j, row, column) for the positions that exist; a loop over no index at run time, so
  // that arrays indexed by j stay in registers.
  template <class Body>
  __device__ __forceinline__ void visit(Body&& body) const {
    int64_t r = row, c = col;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) body(j, r, c);
      if (++c == cols) {
        c = 0;
        ++r;
      }
    }
  }

  __device__ __forceinline__ float pick(const float z[4], int j) const {
    const uint32_t lane = lanes >> (2 * j);
    const float low = lane & 1u ? z[1] : z[0], high = lane & 1u ? z[3] : z[2];
    return lane & 2u ? high : low;
  }

  // z of the four positions: one Philox call per group that they touch, mostly one or two.
  template <class Draw>
  __device__ __forceinline__ void draw(const Draw& draw, const typename Draw::Row& row,
                                       uint32_t uid, float z[4]) const {
    uint32_t pending = (1u << count) - 1u;
    while (pending != 0) {
      const int first = __ffs(static_cast<int>(pending)) - 1;
      uint32_t current = group[0];
#pragma unroll
      for (int j = 1; j < 4; ++j) current = first == j ? group[j] : current;
      float drawn[4];
      draw.four(row, uid, current, drawn);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(pending >> j & 1u) || group[j] != current) continue;
        z[j] = pick(drawn, j);
        pending &= ~(1u << j);
      }
    }
  }
};

// Calls body(quad) for the quads of this thread in a block of the work list.
template <class Body>
__device__ __forceinline__ void for_each_quad(const TensorRow& tensor, int64_t block, Body&& body) {
  const int64_t size = tensor.rows * tensor.cols;
#pragma unroll 1
  for (int i = threadIdx.x; i < kWorkBlock / 4; i += kThreads) {
    const int64_t position = block * kWorkBlock + 4 * i;
    if (position >= size) return;
    body(Quad(tensor, position));
  }
}

}  // namespace
}  // namespace mezo
