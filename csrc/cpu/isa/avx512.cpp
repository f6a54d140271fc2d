// 16 lanes: AVX-512 F, DQ, BW and VL.
#include <immintrin.h>

#include "attention_loops.h"
#include "float16.h"
#include "layers_loops.h"
#include "lora_loops.h"
#include "simd.h"

namespace mezo {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  MEZO_INLINE I set1(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  MEZO_INLINE F set1(float a) { return _mm512_set1_ps(a); }
  MEZO_INLINE I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  MEZO_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  MEZO_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  MEZO_INLINE I bits(F a) { return _mm512_castps_si512(a); }
  MEZO_INLINE F floats(I a) { return _mm512_castsi512_ps(a); }

  MEZO_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  MEZO_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  MEZO_INLINE I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  MEZO_INLINE I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  MEZO_INLINE I bit_xor(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  template <int kShift>
  MEZO_INLINE I sll(I a) {
    return _mm512_slli_epi32(a, kShift);
  }

  MEZO_INLINE I mul_wide(I a, I b) { return _mm512_mul_epu32(a, b); }
  // A shuffle rather than a shift: the multiplier's port is the busy one.
  MEZO_INLINE I high_half(I a) { return bits(_mm512_movehdup_ps(floats(a))); }
  MEZO_INLINE I interleave(I even, I odd) {
    return bits(_mm512_mask_moveldup_ps(floats(even), 0xAAAA, floats(odd)));
  }

  MEZO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  MEZO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  MEZO_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  MEZO_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  MEZO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  MEZO_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
  MEZO_INLINE F float_of_i32(I a) { return _mm512_cvtepi32_ps(a); }
  MEZO_INLINE F float_of_u32(I a) { return _mm512_cvtepu32_ps(a); }

  MEZO_INLINE Mask at_least(I a, uint32_t bound) {
    return _mm512_cmpge_epu32_mask(a, set1(bound));
  }
  MEZO_INLINE Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  MEZO_INLINE Mask bit_30_mask(I a) { return _mm512_test_epi32_mask(a, set1(0x40000000u)); }
  MEZO_INLINE I invert_where(Mask mask, I a) {
    return _mm512_mask_xor_epi32(a, mask, a, set1(0xFFFFFFFFu));
  }
  MEZO_INLINE F zero_where(Mask mask, F a) {
    return _mm512_maskz_mov_ps(static_cast<Mask>(~mask), a);
  }
  MEZO_INLINE F select(Mask mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }
  MEZO_INLINE F negate(F a) { return flip(a, set1(0x80000000u)); }
  MEZO_INLINE F flip(F a, I sign) { return _mm512_xor_ps(a, floats(sign)); }
  // a ^ (b & sign bit)
  MEZO_INLINE F flip_by_sign(F a, I b) {
    return floats(_mm512_ternarylogic_epi32(bits(a), b, set1(0x80000000u), 0x78));
  }

  MEZO_INLINE float max_lane(F a) { return _mm512_reduce_max_ps(a); }
  // Four elements of rows 0, 4, 8 and 12.
  MEZO_INLINE F load_quads(const float* const* rows, int64_t offset) {
    F quads = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + offset));
    quads = _mm512_insertf32x4(quads, _mm_loadu_ps(rows[4] + offset), 1);
    quads = _mm512_insertf32x4(quads, _mm_loadu_ps(rows[8] + offset), 2);
    return _mm512_insertf32x4(quads, _mm_loadu_ps(rows[12] + offset), 3);
  }
  MEZO_INLINE void transpose(const F in[4], F out[4]) {
    const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(in[0], in[1]));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(in[0], in[1]));
    const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(in[2], in[3]));
    const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(in[2], in[3]));
    out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
    out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
    out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
    out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
  }
};

}  // namespace

const Ops& avx512_ops() {
  static const Ops ops = {
      "avx512",
      Simd<Avx512>::words,
      Simd<Avx512>::from_words,
      Simd<Avx512>::generate,
      Simd<Avx512>::add_gaussians,
      {load_float32, load_float16_f16c, load_bfloat16},
      {store_float32, store_float16_f16c, store_bfloat16},
      accumulate,
      {fma_store_float32, fma_store_float16_f16c, fma_store_bfloat16},
      Lora<Avx512>::shrink,
      Lora<Avx512>::expand,
      SharedPrefix<Avx512>::attend,
      Layers<Avx512>::rms_norm,
      Layers<Avx512>::rotary,
      Layers<Avx512>::silu_and_mul,
      VectorMath<Avx512>::exps,
      VectorMath<Avx512>::tanhs,
  };
  return ops;
}

}  // namespace mezo
