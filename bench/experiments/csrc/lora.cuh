// What shrink.cu and expand.cu share: perturbed elements of a factor as fragments, and row tiles.
//
// A warp makes its part of the factor once, for both copies of a pair, and keeps it in registers for
// all rows of both copies. The sum over the inner dimension may run in any fixed order, so it is
// permuted: the four elements that a lane holds of one column of an mma, rows 2 t, 2 t + 1, 2 t + 8
// and 2 t + 9, are four neighbours in memory, one Philox group. The lane's elements of the other
// operand are permuted alike, so that they are neighbours as well.
#pragma once

#include <type_traits>

#include "cuda/draw.cuh"
#include "cuda/memory.cuh"
#include "lora.h"
#include "mma.cuh"

namespace mezo {
namespace {

constexpr int kTileRows = 32;  // two of the 16 rows of an mma
constexpr int kTileMmas = kTileRows / 16;

// Eight elements of 16 bits, aligned to 16 bytes.
__device__ __forceinline__ void load_vector(int64_t address, int64_t dtype,
                                            float values[kVector]) {
  uint32_t words[kVector / 2];
  load_word_run<kVector>(address, words);
  unpack_vector(dtype, words, values);
}

__device__ __forceinline__ void store_vector(int64_t address, int64_t dtype,
                                             const float values[kVector]) {
  uint32_t words[kVector / 2];
  pack_vector(dtype, values, words);
  store_word_run<kVector>(address, words);
}

// A lane's place in a warp, and a warp's in its block.
struct Lane {
  int warp, g, t;
  __device__ __forceinline__ Lane()
      : warp(static_cast<int>(threadIdx.x) / 32),
        g(static_cast<int>(threadIdx.x) % 32 / 4),
        t(static_cast<int>(threadIdx.x) % 4) {}
};

// How a pair's copies come to their elements of a factor.
template <class Draw>
struct PairDraw {
  const Draw& draw;
  typename Draw::Row row = {};
  float scales[2];
  uint32_t uid;
  bool has_direction;

  __device__ __forceinline__ PairDraw(const Draw& draw, const LoraCall& call, const LoraPair& pair,
                                      const TensorRow& factor)
      : draw(draw), uid(static_cast<uint32_t>(factor.uid)), has_direction(pair.direction >= 0) {
    for (int k = 0; k < 2; ++k) scales[k] = call.scales[pair.scales[k]];
    if (has_direction) row = draw.load_row(call.directions + pair.direction);
  }

  // Calls body(has direction) with a constant: a branch at each draw would cut the code into pieces
  // that are not scheduled together.
  template <class Body>
  __device__ __forceinline__ void visit(Body&& body) const {
    if (has_direction) {
      body(std::true_type{});
    } else {
      body(std::false_type{});
    }
  }

  // Four elements of one Philox group as words of the dtype of x, for both copies.
  template <int64_t kDType, bool kHasDirection>
  __device__ __forceinline__ void four(uint32_t group, const uint4& master,
                                       uint32_t packed[2][2]) const {
    // Without a direction the scale is 0 as well. Then a -0 of the master becomes +0, which no sum
    // that begins with +0 shows.
    float values[4], z[4] = {};
    memcpy(values, &master, sizeof values);
    if (kHasDirection) draw.four(row, uid, group, z);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float perturbed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) perturbed[i] = fma_rn(scales[k], z[i], values[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        packed[k][i] = kDType == kFloat16 ? pack_float16(perturbed + 2 * i)
                                          : pack_bfloat16(perturbed + 2 * i);
      }
    }
  }
};

// An element of a factor: its address, and its Philox group. Columns are multiples of 4, and groups
// below 2^32, so that they may wrap on the way.
struct Place {
  int64_t address;
  uint32_t group;
  __device__ __forceinline__ Place(const TensorRow& factor, int64_t row, int64_t col)
      : address(factor.data + 4 * (row * factor.row_stride + col)),
        group(static_cast<uint32_t>(
            ((factor.row0 + row) * factor.global_cols + factor.col0 + col) >> 2)) {}
  // The four elements `groups` groups further on in the row.
  __device__ __forceinline__ uint4 load(int groups) const {
    return load_16_bytes(address + 16 * groups);
  }
};

// Calls body(copy, first row, end of the copy's rows) for this block's tiles of both copies. The
// copy is a constant of each call, so that fragments indexed by it stay in registers.
template <class Body>
__device__ __forceinline__ void for_each_tile(const LoraPair& pair, uint32_t chunk, uint32_t chunks,
                                              Body&& body) {
#pragma unroll
  for (int copy = 0; copy < 2; ++copy) {
    const int64_t last = pair.last[copy];
#pragma unroll 1
    for (int64_t row = pair.first[copy] + static_cast<int64_t>(chunk) * kTileRows; row < last;
         row += static_cast<int64_t>(chunks) * kTileRows) {
      body(copy, row, last);
    }
  }
}

// Calls body(draw, dtype of x as a constant) and returns what it does. Gaussian directions with one
// seed have kernels of their own, all others share one.
template <class Body>
const char* visit_draw(const LoraCall& call, const CommonSeed& seed, Body&& body) {
  const auto with = [&](const auto& draw) {
    return call.x.dtype == kFloat16 ? body(draw, std::integral_constant<int64_t, kFloat16>{})
                                    : body(draw, std::integral_constant<int64_t, kBFloat16>{});
  };
  return seed.domain == kDomainGaussian ? with(GaussianDraw{round_keys(seed.key0, seed.key1)})
                                        : with(AnyDraw{});
}

}  // namespace
}  // namespace mezo
