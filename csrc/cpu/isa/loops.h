// Loops that the compiler vectorises for the flags of the including translation unit. Everything
// has internal linkage, so that no unit calls code compiled for another instruction set.
#pragma once

#include "ops.h"

namespace mezo {
namespace {

inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

inline uint16_t float16_of(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  }
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the last kept bit with the last bit of the fp32 sum.
    const float aligned = float_of_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of_float(aligned) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float float_of_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude > 0x7C00u) return float_of_bits(sign | 0x7FC00000u | (magnitude & 0x3FFu) << 13);
  if (magnitude == 0x7C00u) return float_of_bits(sign | 0x7F800000u);
  // Rebias the exponent by a power of two: exact, and right for subnormals too.
  const float value = float_of_bits(magnitude << 13) * 0x1p112f;
  return float_of_bits(sign | bits_of_float(value));
}

inline void load_float32(float* acc, const void* src, int64_t n) {
  memcpy(acc, src, static_cast<size_t>(n) * sizeof(float));
}

inline void load_float16(float* acc, const void* src, int64_t n) {
  const uint16_t* from = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; ++i) acc[i] = float_of_float16(from[i]);
}

inline void load_bfloat16(float* acc, const void* src, int64_t n) {
  const uint16_t* from = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; ++i) acc[i] = float_of_bits(static_cast<uint32_t>(from[i]) << 16);
}

inline void store_float32(void* dst, const float* src, int64_t n) {
  memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
}

inline void store_float16(void* dst, const float* src, int64_t n) {
  uint16_t* to = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) to[i] = float16_of(src[i]);
}

inline void store_bfloat16(void* dst, const float* src, int64_t n) {
  uint16_t* __restrict__ to = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_of(src[i]);
}

inline void accumulate(float* __restrict__ acc, const float* __restrict__ z, float c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) acc[i] = fma_rn(c, z[i], acc[i]);
}

inline void fma_store_float32(void* dst, const float* __restrict__ acc, const float* __restrict__ z,
                              float c, int64_t n) {
  float* __restrict__ to = static_cast<float*>(dst);
  for (int64_t i = 0; i < n; ++i) to[i] = fma_rn(c, z[i], acc[i]);
}

inline void fma_store_float16(void* dst, const float* __restrict__ acc, const float* __restrict__ z,
                              float c, int64_t n) {
  uint16_t* __restrict__ to = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) to[i] = float16_of(fma_rn(c, z[i], acc[i]));
}

inline void fma_store_bfloat16(void* dst, const float* __restrict__ acc,
                               const float* __restrict__ z, float c, int64_t n) {
  uint16_t* __restrict__ to = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_of(fma_rn(c, z[i], acc[i]));
}

// 128 signs a call; first is a multiple of 128.
inline void generate_rademacher(float* __restrict__ z, const Stream& stream, int64_t first,
                                int64_t n) {
  for (int64_t done = 0; done < n; done += 128) {
    uint32_t words[4];
    philox(stream, static_cast<uint32_t>((first + done) >> 7), words);
    for (int w = 0; w < 4; ++w) {
      for (uint32_t bit = 0; bit < 32; ++bit) {
        z[done + 32 * w + bit] = float_of_bits(0x3F800000u | (words[w] >> bit) << 31);
      }
    }
  }
}

}  // namespace
}  // namespace mezo
