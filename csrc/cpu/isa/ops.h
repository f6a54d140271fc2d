// The inner loops that exist once per instruction set, all with the same bits.
#pragma once

#include "table.h"

namespace mezo {

// Generators write whole batches, so z needs room for this many floats beyond the last one asked.
constexpr int64_t kGeneratorSlack = 128;

// One adapter's rows of x through lora_A: h[t, j] = scale * sum_k x[t, k] a[j, k].
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

// Attention of rows that share prefixes. Keys of a tile, queries of a block, largest head dim.
constexpr int kAttentionTile = 64;
constexpr int kAttentionQueries = 48;
constexpr int kAttentionMaxDim = 256;

// Tokens or slots x heads x dim, the last one contiguous; strides in bytes.
struct AttentionTensor {
  char* data;
  int64_t token_stride, head_stride;

  void* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// A block of packed queries of a group: the heads of a KV head, token by token, row by row, from a
// head of a token of a row on. `row` is an index into Attention::rows, two entries a row. All
// fields are 64 bits wide: a block is a row of an int64 tensor.
struct AttentionBlock {
  int64_t prefix, prefix_len;  // range of Attention::slots
  int64_t row, place, head;
  int64_t count;
};

struct Attention {
  AttentionTensor q, k, v, k_cache, v_cache, out;
  float* lse;  // [tokens, heads], or null
  const int64_t* rows;  // first token and end of each row, group by group
  const int64_t* slots;
  int64_t heads, heads_per_kv_head, dim, v_dim, dtype;
  float scale, soft_cap;
  // Of the dtype; filled in by the driver.
  void (*load)(float* acc, const void* src, int64_t n);
  void (*store)(void* dst, const float* src, int64_t n);
  void (*write_lse)(float* lse, float max, float sum);
};

// Layers of a model on rows of fp32 numbers; strides in numbers, outputs contiguous.
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

struct Ops {
  const char* name;
  // Philox words of groups c0 .. c0 + n - 1, and Gaussians of given words: for tests.
  void (*words)(uint32_t* out, const Stream& stream, uint32_t c0, int64_t n);
  void (*from_words)(float* z, const uint32_t* words, int64_t n);
  // z of the elements first .. first + n - 1, where first is a multiple of what one Philox call
  // serves (aligned_element below). Writes up to kGeneratorSlack floats more.
  void (*generate)(float* z, const Stream& stream, int64_t first, int64_t n);
  // acc <- src;  dst <- round(src);  acc <- fma(c, z, acc);  dst <- round(fma(c, z, acc))
  void (*load[kNumDTypes])(float* acc, const void* src, int64_t n);
  void (*store[kNumDTypes])(void* dst, const float* src, int64_t n);
  void (*accumulate)(float* acc, const float* z, float c, int64_t n);
  void (*fma_store[kNumDTypes])(void* dst, const float* acc, const float* z, float c, int64_t n);
  void (*lora_shrink)(const Shrink&);
  void (*lora_expand)(const Expand&);
  void (*attend)(const Attention&, const AttentionBlock&, int64_t kv_head);
  void (*rms_norm)(const RmsNorm&, int64_t row);
  void (*rotary)(const Rotary&, int64_t row);
  void (*silu_and_mul)(const GatedRows&, int64_t row);
  // exp of numbers <= 0, tanh: for tests.
  void (*exps)(float* out, const float* in, int64_t n);
  void (*tanhs)(float* out, const float* in, int64_t n);
};

MEZO_HD int64_t aligned_element(const Stream& stream, int64_t element) {
  return element & ~static_cast<int64_t>(is_rademacher(stream) ? 127 : 3);
}

const Ops& portable_ops();
#if defined(MEZO_X86)
const Ops& avx2_ops();
const Ops& avx512_ops();
#endif

}  // namespace mezo
