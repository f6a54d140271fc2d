// Which elements a thread has: vectors of eight in tensors that allow it, else runs of four.
#pragma once

#include "draw.cuh"
#include "directions.h"
#include "memory.cuh"

namespace mezo {
namespace {

constexpr int kThreads = 128;
constexpr int kVectorsPerBlock = kWorkBlock / kVector;
constexpr int kVectorsPerThread = kVectorsPerBlock / kThreads;

// Vectors v of a thread, v = 0 .. kVectorsPerThread - 1, coalesced over the threads.
struct VectorWalk {
  VectorRow shape;
  uint32_t start;

  __device__ __forceinline__ VectorWalk(const CudaTables& tables, const Work& work) {
    const uint4* row = reinterpret_cast<const uint4*>(tables.vectors + work.tensor);
    const uint4 parts[2] = {row[0], row[1]};
    memcpy(&shape, parts, sizeof shape);
    start = work.block * kVectorsPerBlock + threadIdx.x;
  }
  __device__ __forceinline__ uint32_t index(int v) const { return start + v * kThreads; }
  __device__ __forceinline__ bool is_inside(int v) const { return index(v) < shape.num_vectors; }
  __device__ __forceinline__ uint32_t row(int v) const {
    return __umulhi(index(v) << 1, shape.multiplier) >> shape.shift;
  }
  __device__ __forceinline__ uint32_t col(int v) const { return index(v) - row(v) * shape.cols; }
  // The first of the two Philox groups; elements stay below 2^34, so groups are 32 bits wide.
  __device__ __forceinline__ uint32_t group(int v) const {
    return 2 * (shape.first + row(v) * shape.global_cols + col(v));
  }
  // In vectors from the tensor's address. A stride is below 2^32 vectors.
  __device__ __forceinline__ int64_t offset(int v, int64_t row_stride) const {
    const uint32_t stride = static_cast<uint32_t>(static_cast<uint64_t>(row_stride) / kVector);
    return static_cast<int64_t>(static_cast<uint64_t>(row(v)) * stride + col(v));
  }
};

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
