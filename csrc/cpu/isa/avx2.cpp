// 8 lanes: AVX2, FMA and F16C.
#include <immintrin.h>

#include "attention_loops.h"
#include "float16.h"
#include "layers_loops.h"
#include "lora_loops.h"
#include "simd.h"

namespace mezo {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  using Mask = __m256i;
  static constexpr int kLanes = 8;

  MEZO_INLINE I set1(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  MEZO_INLINE F set1(float a) { return _mm256_set1_ps(a); }
  MEZO_INLINE I load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  MEZO_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  MEZO_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  MEZO_INLINE I bits(F a) { return _mm256_castps_si256(a); }
  MEZO_INLINE F floats(I a) { return _mm256_castsi256_ps(a); }

  MEZO_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  MEZO_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  MEZO_INLINE I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  MEZO_INLINE I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  MEZO_INLINE I bit_xor(I a, I b, I c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  template <int kShift>
  MEZO_INLINE I sll(I a) {
    return _mm256_slli_epi32(a, kShift);
  }

  MEZO_INLINE I mul_wide(I a, I b) { return _mm256_mul_epu32(a, b); }
  MEZO_INLINE I high_half(I a) { return _mm256_srli_epi64(a, 32); }
  MEZO_INLINE I interleave(I even, I odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }

  MEZO_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  MEZO_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  MEZO_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  MEZO_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  MEZO_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  MEZO_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
  MEZO_INLINE F float_of_i32(I a) { return _mm256_cvtepi32_ps(a); }
  // Both halves are exact, and so is their fma but for its one rounding.
  MEZO_INLINE F float_of_u32(I a) {
    const F high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
    const F low = _mm256_cvtepi32_ps(_mm256_blend_epi16(a, _mm256_setzero_si256(), 0xAA));
    return _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
  }

  MEZO_INLINE I at_least(I a, uint32_t bound) {
    return _mm256_cmpeq_epi32(_mm256_max_epu32(a, set1(bound)), a);
  }
  MEZO_INLINE I less(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  MEZO_INLINE I bit_30_mask(I a) { return sll<1>(a); }
  MEZO_INLINE I invert_where(I mask, I a) { return _mm256_xor_si256(a, mask); }
  MEZO_INLINE F zero_where(I mask, F a) { return _mm256_andnot_ps(floats(mask), a); }
  MEZO_INLINE F select(I mask, F yes, F no) { return _mm256_blendv_ps(no, yes, floats(mask)); }
  MEZO_INLINE F negate(F a) { return flip(a, set1(0x80000000u)); }
  MEZO_INLINE F flip(F a, I sign) { return _mm256_xor_ps(a, floats(sign)); }
  // a ^ (b & sign bit)
  MEZO_INLINE F flip_by_sign(F a, I b) { return flip(a, bit_and(b, set1(0x80000000u))); }

  MEZO_INLINE float max_lane(F a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  // Four elements of rows 0 and 4.
  MEZO_INLINE F load_quads(const float* const* rows, int64_t offset) {
    const F low = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + offset));
    return _mm256_insertf128_ps(low, _mm_loadu_ps(rows[4] + offset), 1);
  }
  MEZO_INLINE void transpose(const F in[4], F out[4]) {
    const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(in[0], in[1]));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(in[0], in[1]));
    const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(in[2], in[3]));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(in[2], in[3]));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
  }
};

}  // namespace

const Ops& avx2_ops() {
  static const Ops ops = {
      "avx2",
      Simd<Avx2>::words,
      Simd<Avx2>::from_words,
      Simd<Avx2>::generate,
      Simd<Avx2>::add_gaussians,
      {load_float32, load_float16_f16c, load_bfloat16},
      {store_float32, store_float16_f16c, store_bfloat16},
      accumulate,
      {fma_store_float32, fma_store_float16_f16c, fma_store_bfloat16},
      Lora<Avx2>::shrink,
      Lora<Avx2>::expand,
      SharedPrefix<Avx2>::attend,
      Layers<Avx2>::rms_norm,
      Layers<Avx2>::rotary,
      Layers<Avx2>::silu_and_mul,
      VectorMath<Avx2>::exps,
      VectorMath<Avx2>::tanhs,
  };
  return ops;
}

}  // namespace mezo
