// fp16 by hardware conversion (F16C), with the bits of loops.h.
#pragma once

#include <immintrin.h>

#include "loops.h"

namespace mezo {
namespace {

inline void load_float16_f16c(float* acc, const void* src, int64_t n) {
  const uint16_t* from = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(acc + i, _mm256_cvtph_ps(halves));
  }
  load_float16(acc + i, from + i, n - i);
}

inline void store_float16_f16c(void* dst, const float* src, int64_t n) {
  uint16_t* to = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves =
        _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  store_float16(to + i, src + i, n - i);
}

inline void fma_store_float16_f16c(void* dst, const float* acc, const float* z, float c,
                                   int64_t n) {
  uint16_t* to = static_cast<uint16_t*>(dst);
  const __m256 scale = _mm256_set1_ps(c);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 sum = _mm256_fmadd_ps(scale, _mm256_loadu_ps(z + i), _mm256_loadu_ps(acc + i));
    const __m128i halves = _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  fma_store_float16(to + i, acc + i, z + i, c, n - i);
}

}  // namespace
}  // namespace mezo
