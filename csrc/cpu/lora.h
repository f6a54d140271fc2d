// LoRA on the CPU, of a batch whose rows are segments of one adapter each.
#pragma once

#include <stdint.h>

namespace mezo {

// Rows of fp32 numbers, and matrices of adapters by slot.
struct Rows {
  float* data;
  int64_t stride, width;
};
struct Slots {
  const float* data;
  int64_t slot_stride, row_stride;
};
// Rows start .. stop - 1 of a batch belong to the adapter in a slot.
struct LoraSegment {
  int64_t start, stop, slot;
  float scaling;
};
struct LoraBatch {
  const LoraSegment* segments;
  int64_t num_segments;
};

// h <- scaling x A^T; rows of h outside of the segments are not written.
void cpu_lora_shrink(const LoraBatch& batch, const Rows& x, const Slots& a, const Rows& h,
                     int threads);

// out[:, slice s] += h[:, s r .. (s + 1) r] B^T, where offsets[s] .. offsets[s + 1] are its columns.
void cpu_lora_expand(const LoraBatch& batch, const Rows& h, const Slots& b, const Rows& out,
                     const int64_t* offsets, int64_t num_slices, int threads);

// What an instruction set computes at once: one adapter's rows of x through lora_A,
// h[t, j] = scale * sum_k x[t, k] a[j, k].
struct Shrink {
  const float* x;
  int64_t x_stride, rows, depth;
  const float* a;
  int64_t a_stride, cols;
  float* h;
  int64_t h_stride;
  float scale;
};

// And through lora_B: out[t, d] += sum_q h[t, q] b[d, q].
struct Expand {
  const float* h;
  int64_t h_stride, rows, rank;
  const float* b;
  int64_t b_stride, cols;
  float* out;
  int64_t out_stride;
};

}  // namespace mezo
