// The one C/C++ definition of a random direction z, for the host and for CUDA devices.
// mezo_kernels/directions/philox.py holds the same text for PyTorch; the bits of both are equal,
// always.
//
// Words: Philox4x32-10 (Salmon et al. 2011) with key = (seed low, seed high) and
//   Gaussian    counter = (e >> 2, uid, step, 0 << 24 | index), word e & 3 belongs to element e
//   Rademacher  counter = (e >> 7, uid, step, 1 << 24 | index), bit e & 31 of word (e & 127) >> 5,
//               0 -> +1, 1 -> -1
// where e is the row-major index of the element in the whole (unsharded, unpadded) tensor.
//
// Gaussian: Box-Muller on the word pairs (0, 1) and (2, 3); the first word gives the radius
// r = sqrt(-2 log u), the second the angle, z_even = r cos, z_odd = r sin. Every operation is one
// correctly rounded fp32 add, mul, fma, sqrt or int -> float conversion, in the order below:
//
//   radius  u = (w + .5) 2^-32.  is_big = w >= kBigWord (u >= sqrt(.5));  x = is_big ? ~w : w
//           v = fma(float(x), 2^-32, 2^-33)
//           not big: u = v = 2^e (1 + f), 1 + f in [sqrt(.5), sqrt(2))
//           big:     f = -v, e = 0, so a radius near 0 keeps its full relative precision
//           y = f + fma(-.5, f^2, fma(f^3, P(f), e LN2_LO));   r = sqrt(-2 fma(e, LN2_HI, y))
//   angle   q = (w + 2^29) >> 30 (mod 4);  t = float(int32(w << 2)) 2^-32 in [-.5, .5) quadrants
//           s = fma(t, PIO2_HI, t fma(t^2, S(t^2), PIO2_LO));   c = fma(t^2, C(t^2), 1)
//           (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c) for q = 0, 1, 2, 3
//
// P, S and C are minimax polynomials in Horner form. A change of any constant or of any order of
// operations changes z, and with it every stored trajectory: it is a format break. Scalings by
// powers of two are exact wherever nothing underflows, so the code below moves them at will.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define MEZO_HD static __host__ __device__ __forceinline__
#define MEZO_HD_MEMBER __host__ __device__ __forceinline__
#else
// Translation units are compiled for different instruction sets: nothing here may be shared
// between them by the linker, hence static and always inlined.
#define MEZO_HD static inline __attribute__((always_inline))
#define MEZO_HD_MEMBER inline __attribute__((always_inline))
#endif

namespace mezo {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

constexpr uint32_t kDomainGaussian = 0;
constexpr uint32_t kDomainRademacher = 1;

constexpr uint32_t kSqrtHalfBits = 0x3F3504F3u;  // fp32 bits of sqrt(.5), rounded down
constexpr uint32_t kBigWord = 0xB504F300u;       // the same number times 2^32
constexpr float kTwoM32 = 0x1p-32f;
constexpr float kTwoM33 = 0x1p-33f;
constexpr float kTwoM23 = 0x1p-23f;
constexpr float kLn2Hi = 0x1.62e430p-1f;
constexpr float kLn2Lo = -0x1.05c610p-29f;
constexpr float kLogP0 = 0x1.55551ep-2f;
constexpr float kLogP1 = -0x1.0002b2p-2f;
constexpr float kLogP2 = 0x1.99b418p-3f;
constexpr float kLogP3 = -0x1.545e62p-3f;
constexpr float kLogP4 = 0x1.219c8ap-3f;
constexpr float kLogP5 = -0x1.0d2e2ep-3f;
constexpr float kLogP6 = 0x1.0be516p-3f;
constexpr float kLogP7 = -0x1.482e4cp-4f;
constexpr float kPio2Hi = 0x1.921fb6p+0f;
constexpr float kPio2Lo = -0x1.777a5cp-25f;
constexpr float kSinS0 = -0x1.4abbbep-1f;
constexpr float kSinS1 = 0x1.465facp-4f;
constexpr float kSinS2 = -0x1.2db5ccp-8f;
constexpr float kCosC0 = -0x1.3bd3ccp+0f;
constexpr float kCosC1 = 0x1.03c1b0p-2f;
constexpr float kCosC2 = -0x1.55b2b4p-6f;
constexpr float kCosC3 = 0x1.d4f632p-11f;

// The stream of one tensor under one direction: everything of key and counter but c0.
struct Stream {
  uint32_t key0, key1, uid, step, tail;  // tail = domain << 24 | index
};

#if defined(__CUDA_ARCH__)
MEZO_HD float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MEZO_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
MEZO_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
// The path that nvcc uses for __fsqrt_rn from 2^-101 up, without the range check and the branch
// around it: radius() asks for roots of [2^-33, 46] only.
MEZO_HD float sqrt_rn(float a) {
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(a));
  const float root = __fmul_rn(a, reciprocal);
  return __fmaf_rn(__fmaf_rn(-root, root, a), __fmul_rn(0.5f, reciprocal), root);
}
MEZO_HD float float_of_u32(uint32_t a) { return __uint2float_rn(a); }
MEZO_HD float float_of_i32(int32_t a) { return __int2float_rn(a); }
#else
MEZO_HD float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MEZO_HD float mul_rn(float a, float b) { return a * b; }
MEZO_HD float add_rn(float a, float b) { return a + b; }
MEZO_HD float sqrt_rn(float a) { return __builtin_sqrtf(a); }
MEZO_HD float float_of_u32(uint32_t a) { return static_cast<float>(a); }
MEZO_HD float float_of_i32(int32_t a) { return static_cast<float>(a); }
#endif

MEZO_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MEZO_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

MEZO_HD bool is_rademacher(const Stream& s) { return (s.tail >> 24) == kDomainRademacher; }

// The keys of the rounds: added up on the way, or expanded beforehand.
struct SeedKeys {
  uint32_t seed0, seed1;
  MEZO_HD_MEMBER uint32_t key0(int round) const { return seed0 + round * kPhiloxW0; }
  MEZO_HD_MEMBER uint32_t key1(int round) const { return seed1 + round * kPhiloxW1; }
};

struct RoundKeys {
  uint32_t keys0[kPhiloxRounds], keys1[kPhiloxRounds];
  MEZO_HD_MEMBER uint32_t key0(int round) const { return keys0[round]; }
  MEZO_HD_MEMBER uint32_t key1(int round) const { return keys1[round]; }
};

MEZO_HD RoundKeys round_keys(uint32_t seed0, uint32_t seed1) {
  const SeedKeys seed = {seed0, seed1};
  RoundKeys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.keys0[round] = seed.key0(round);
    keys.keys1[round] = seed.key1(round);
  }
  return keys;
}

// out = Philox4x32-10 of the counter (c0, uid, step, tail).
template <class Keys>
MEZO_HD void philox(const Keys& keys, uint32_t c0, uint32_t uid, uint32_t step, uint32_t tail,
                    uint32_t out[4]) {
  uint32_t a = c0, b = uid, c = step, d = tail;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * a;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * c;
    a = static_cast<uint32_t>(product1 >> 32) ^ b ^ keys.key0(round);
    b = static_cast<uint32_t>(product1);
    c = static_cast<uint32_t>(product0 >> 32) ^ d ^ keys.key1(round);
    d = static_cast<uint32_t>(product0);
  }
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}

MEZO_HD void philox(const Stream& s, uint32_t c0, uint32_t out[4]) {
  philox(SeedKeys{s.key0, s.key1}, c0, s.uid, s.step, s.tail, out);
}

MEZO_HD float radius(uint32_t word) {
  const bool is_big = word >= kBigWord;
  const float v = fma_rn(float_of_u32(is_big ? ~word : word), kTwoM32, kTwoM33);
  // e 2^23, and the mantissa, which is v without its exponent e.
  const uint32_t exponent = (bits_of_float(v) - kSqrtHalfBits) & 0xFF800000u;
  const float mantissa = float_of_bits(bits_of_float(v) - exponent);
  const float e23 = is_big ? 0.0f : float_of_i32(static_cast<int32_t>(exponent));
  const float f = is_big ? -v : add_rn(mantissa, -1.0f);
  const float f2 = mul_rn(f, f);
  float p = fma_rn(kLogP7, f, kLogP6);
  p = fma_rn(p, f, kLogP5);
  p = fma_rn(p, f, kLogP4);
  p = fma_rn(p, f, kLogP3);
  p = fma_rn(p, f, kLogP2);
  p = fma_rn(p, f, kLogP1);
  p = fma_rn(p, f, kLogP0);
  const float y = fma_rn(mul_rn(f2, f), p, mul_rn(e23, kTwoM23 * kLn2Lo));
  const float minus_2y = fma_rn(-2.0f, f, fma_rn(-2.0f, y, f2));
  return sqrt_rn(fma_rn(e23, -2.0f * kTwoM23 * kLn2Hi, minus_2y));
}

// z[0] = r cos, z[1] = r sin.
MEZO_HD void box_muller(uint32_t radius_word, uint32_t angle_word, float z[2]) {
  // Bits 30 and 31 hold the quadrant, and bit 31 of a quadrant further on the sign of the cosine.
  const uint32_t turned = angle_word + 0x20000000u;
  const uint32_t sign_cos = (turned + 0x40000000u) & 0x80000000u, sign_sin = turned & 0x80000000u;
  const float t = mul_rn(float_of_i32(static_cast<int32_t>(angle_word << 2)), kTwoM32);
  const float t2 = mul_rn(t, t);
  const float s_poly = fma_rn(fma_rn(kSinS2, t2, kSinS1), t2, kSinS0);
  const float s = fma_rn(t, kPio2Hi, mul_rn(t, fma_rn(t2, s_poly, kPio2Lo)));
  float c_poly = fma_rn(fma_rn(kCosC3, t2, kCosC2), t2, kCosC1);
  c_poly = fma_rn(c_poly, t2, kCosC0);
  const float c = fma_rn(t2, c_poly, 1.0f);
  const bool is_swapped = turned & 0x40000000u;
  const float x = is_swapped ? s : c, y = is_swapped ? c : s;
  const float r = radius(radius_word);
  z[0] = mul_rn(r, float_of_bits(bits_of_float(x) ^ sign_cos));
  z[1] = mul_rn(r, float_of_bits(bits_of_float(y) ^ sign_sin));
}

MEZO_HD void gaussian_of_words(const uint32_t words[4], float z[4]) {
  box_muller(words[0], words[1], z);
  box_muller(words[2], words[3], z + 2);
}

// The 32 signs of the element `element` and its neighbours, from the four words of 128 elements.
MEZO_HD uint32_t sign_word(const uint32_t words[4], uint32_t element) {
  const uint32_t low = element & 32u ? words[1] : words[0];
  const uint32_t high = element & 32u ? words[3] : words[2];
  return element & 64u ? high : low;
}

MEZO_HD float sign_of_bit(uint32_t word, uint32_t bit) {
  return float_of_bits(0x3F800000u | (word >> (bit & 31u)) << 31);
}

// z of the four elements 4 * group .. 4 * group + 3.
MEZO_HD void direction_group(const Stream& s, int64_t group, float z[4]) {
  uint32_t words[4];
  if (is_rademacher(s)) {
    philox(s, static_cast<uint32_t>(group >> 5), words);
    const uint32_t element = static_cast<uint32_t>(group) << 2;
    const uint32_t word = sign_word(words, element);
    for (uint32_t i = 0; i < 4; ++i) z[i] = sign_of_bit(word, element + i);
  } else {
    philox(s, static_cast<uint32_t>(group), words);
    gaussian_of_words(words, z);
  }
}

}  // namespace mezo
