// Norms, rotary embeddings and gated activations on the CPU: rows of fp32 numbers, strides in
// numbers, outputs contiguous.
#pragma once

#include <stdint.h>

namespace mezo {

struct RmsNorm {
  const float* x;
  int64_t x_stride;
  const float* residual;  // or null
  int64_t residual_stride;
  const float* weight;
  float eps;
  int64_t width;
  float* summed;  // written where there is a residual
  float* out;
};

struct Rotary {
  const float* x;
  int64_t x_stride, heads, head_dim;
  const int64_t* positions;
  const float* cos_sin;  // by position, head_dim / 2 cosines and as many sines
  int64_t cos_sin_stride;
  float* out;
};

struct GatedRows {
  const float* x;
  int64_t x_stride, width;  // width: of a half
  float* out;
};

// Layers of a model over rows. The caller has checked that positions lie in the table.
void cpu_rms_norm(const RmsNorm& norm, int64_t rows, int threads);
void cpu_rotary(const Rotary& rotary, int64_t rows, int threads);
void cpu_silu_and_mul(const GatedRows& gated, int64_t rows, int threads);

}  // namespace mezo
