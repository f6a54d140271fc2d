// The inner loops that exist once per instruction set, all with the same bits.
#pragma once

#include "cpu/attention.h"
#include "cpu/layers.h"
#include "cpu/lora.h"
#include "table.h"

namespace mezo {

// Generators write whole batches, so z needs room for this many floats beyond the last one asked.
constexpr int64_t kGeneratorSlack = 128;

struct Ops {
  const char* name;
  // Philox words of groups c0 .. c0 + n - 1, and Gaussians of given words: for tests.
  void (*words)(uint32_t* out, const Stream& stream, uint32_t c0, int64_t n);
  void (*from_words)(float* z, const uint32_t* words, int64_t n);
  // z of the elements first .. first + n - 1, where first is a multiple of what one Philox call
  // serves (aligned_element below). Writes up to kGeneratorSlack floats more.
  void (*generate)(float* z, const Stream& stream, int64_t first, int64_t n);
  // acc[i] <- fma(c_k, z_k(element + i), acc[i]) for every k in order, z_k of a tensor. All
  // directions are Gaussian and of one seed, and there is one at least.
  void (*add_gaussians)(float* acc, const Combination& sum, int64_t uid, int64_t element,
                        int64_t n);
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

// The instruction set in use: "auto" picks the best one of this CPU. Returns false for one it lacks.
bool select_ops(const char* name);
const Ops& selected_ops();

}  // namespace mezo
