// The directions of an update, one after another, with their coefficients.
#pragma once

#include "walk.cuh"

namespace mezo {
namespace {

// Calls body(row, coefficient) for each direction of the update that counts. One row of the list is
// read ahead, so that its load is over when the registers need it.
template <class Draw, class Body>
__device__ __forceinline__ void for_each_update(const CudaScalars& scalars, int count,
                                                const Draw& draw, Body&& body) {
  if (count == 0) return;
  typename Draw::Row row = draw.load_row(scalars.directions);
  float coefficient = scalars.factors[0];
#pragma unroll 1
  for (int k = 1; k <= count; ++k) {
    const int ahead = k < count ? k : 0;
    const typename Draw::Row next_row = draw.load_row(scalars.directions + ahead);
    const float next_coefficient = scalars.factors[ahead];
    body(row, coefficient);
    row = next_row;
    coefficient = next_coefficient;
  }
}

// values <- fma(coefficient, z, values) for a vector whose runs begin at the given groups.
template <int kRun, class Draw>
__device__ __forceinline__ void add_direction(const Draw& draw, const typename Draw::Row& row,
                                              float coefficient, uint32_t uid,
                                              const uint32_t group[kVector / kRun],
                                              float values[kVector]) {
  float z[kVector];
  draw_vector<kRun>(draw, row, uid, group, z);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = fma_rn(coefficient, z[i], values[i]);
}

template <class Draw>
__device__ __forceinline__ void add_direction(const Draw& draw, const typename Draw::Row& row,
                                              float coefficient, uint32_t uid, const Quad& quad,
                                              float values[4]) {
  float z[4] = {};
  quad.draw(draw, row, uid, z);
#pragma unroll
  for (int j = 0; j < 4; ++j) values[j] = fma_rn(coefficient, z[j], values[j]);
}

}  // namespace
}  // namespace mezo
