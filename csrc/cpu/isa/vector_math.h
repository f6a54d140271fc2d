// Rows that fill no register, and exp and tanh, in fp32 on vector registers. They are written once
// over an instruction set `Isa`, with the same bits on every one of them. NaN stays NaN.
#pragma once

#include "loops.h"
#include "simd.h"

namespace mezo {
namespace {

// exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2, to 3e-9.
constexpr float kExpQ0 = 0x1p-1f;
constexpr float kExpQ1 = 0x1.55548ep-3f;
constexpr float kExpQ2 = 0x1.55545ep-5f;
constexpr float kExpQ3 = 0x1.123b92p-7f;
constexpr float kExpQ4 = 0x1.6db47ep-10f;
constexpr float kLog2E = 0x1.715476p+0f;
// Below this exp is 0: what a softmax gives there is nothing beside the 1 of its largest score, and
// the power of two below stays a normal number.
constexpr float kExpCutOff = -87.0f;
// Adding it rounds to an integer, which then stands in the low bits, already biased as an exponent.
constexpr float kExpRound = 0x1.8p23f + 127.0f;

// tanh(x) = x + x^3 p(x^2) for |x| < kTanhSmall, to 2^-29.
constexpr float kTanhSmall = 0.55f;
constexpr float kTanhP0 = -0x1.55554cp-2f;
constexpr float kTanhP1 = 0x1.110d38p-3f;
constexpr float kTanhP2 = -0x1.b92b14p-5f;
constexpr float kTanhP3 = 0x1.5950cep-6f;
constexpr float kTanhP4 = -0x1.9b97d0p-8f;

template <class Isa>
struct VectorMath {
  using F = typename Isa::F;
  using I = typename Isa::I;

  // Up to kLanes numbers; the rest of the register is 0.
  MEZO_INLINE F load(const float* from, int64_t left) {
    if (left >= Isa::kLanes) return Isa::load(from);
    float buffer[Isa::kLanes] = {};
    memcpy(buffer, from, static_cast<size_t>(left) * sizeof(float));
    return Isa::load(buffer);
  }
  MEZO_INLINE void store(float* to, F value, int64_t left) {
    if (left >= Isa::kLanes) return Isa::store(to, value);
    float buffer[Isa::kLanes];
    Isa::store(buffer, value);
    memcpy(to, buffer, static_cast<size_t>(left) * sizeof(float));
  }

  // exp(x) for x <= 0, to 1 ulp; 0 below kExpCutOff.
  MEZO_INLINE F exp_nonpositive(F x) {
    const F shifted = Isa::fma(x, Isa::set1(kLog2E), Isa::set1(kExpRound));
    const F n = Isa::add(shifted, Isa::set1(-kExpRound));
    F r = Isa::fma(n, Isa::set1(-kLn2Hi), x);
    r = Isa::fma(n, Isa::set1(-kLn2Lo), r);
    F p = Isa::fma(Isa::set1(kExpQ4), r, Isa::set1(kExpQ3));
    p = Isa::fma(p, r, Isa::set1(kExpQ2));
    p = Isa::fma(p, r, Isa::set1(kExpQ1));
    p = Isa::fma(p, r, Isa::set1(kExpQ0));
    p = Isa::fma(p, r, Isa::set1(1.0f));
    p = Isa::fma(p, r, Isa::set1(1.0f));
    const F power = Isa::floats(Isa::template sll<23>(Isa::bits(shifted)));
    return Isa::zero_where(Isa::less(x, Isa::set1(kExpCutOff)), Isa::mul(p, power));
  }

  // To 2 ulp.
  MEZO_INLINE F tanh(F x) {
    const I sign = Isa::bit_and(Isa::bits(x), Isa::set1(0x80000000u));
    const F size = Isa::flip(x, sign);
    const F square = Isa::mul(size, size);
    F p = Isa::fma(Isa::set1(kTanhP4), square, Isa::set1(kTanhP3));
    p = Isa::fma(p, square, Isa::set1(kTanhP2));
    p = Isa::fma(p, square, Isa::set1(kTanhP1));
    p = Isa::fma(p, square, Isa::set1(kTanhP0));
    const F small = Isa::fma(Isa::mul(square, size), p, size);
    const F e = exp_nonpositive(Isa::mul(Isa::set1(-2.0f), size));
    const F one = Isa::set1(1.0f);
    const F large = Isa::div(Isa::add(one, Isa::negate(e)), Isa::add(one, e));
    return Isa::flip(Isa::select(Isa::less(size, Isa::set1(kTanhSmall)), small, large), sign);
  }

  // Whole arrays, for tests.
  static void exps(float* out, const float* in, int64_t n) {
    each(out, in, n, [](F x) __attribute__((always_inline)) { return exp_nonpositive(x); });
  }
  static void tanhs(float* out, const float* in, int64_t n) {
    each(out, in, n, [](F x) __attribute__((always_inline)) { return tanh(x); });
  }

 private:
  template <class Function>
  static void each(float* out, const float* in, int64_t n, Function&& function) {
    for (int64_t i = 0; i < n; i += Isa::kLanes) {
      store(out + i, function(load(in + i, n - i)), n - i);
    }
  }
};

}  // namespace
}  // namespace mezo
