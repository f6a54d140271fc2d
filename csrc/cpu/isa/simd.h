// Exact Gaussians on vector registers, written once over an instruction set `Isa`. The arithmetic
// is that of philox.h, operation by operation.
//
// `Isa::Mask` is what at_least and sign_mask return: lanes of ones, or a mask register.
//
// A batch is kLanes groups (4 kLanes elements). Lane 4 g + l of every vector holds group
// (kLanes / 4) l + g, so an in-lane 4x4 transpose of the four result vectors is memory order.
// Philox keeps each lane in the low half of a 64-bit lane, where the widening multiply wants it:
// `even` holds the even lanes, `odd` the odd ones; the high halves are never read.
#pragma once

#include "loops.h"

#define MEZO_INLINE static inline __attribute__((always_inline))

namespace mezo {
namespace {

template <class Isa>
struct Simd {
  using F = typename Isa::F;
  using I = typename Isa::I;
  static constexpr int kLanes = Isa::kLanes;

  struct Words {
    I w[4];
  };
  struct Normals {
    F z[4];
  };

  // What stays the same over a run of batches.
  struct Setup {
    I key0[kPhiloxRounds], key1[kPhiloxRounds];
    I even, odd;  // group offsets inside a batch
    I uid, step, tail;

    explicit Setup(const Stream& s) : uid(Isa::set1(s.uid)), step(Isa::set1(s.step)) {
      tail = Isa::set1(s.tail);
      uint32_t k0 = s.key0, k1 = s.key1;
      for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
        key0[round] = Isa::set1(k0);
        key1[round] = Isa::set1(k1);
      }
      uint32_t even_offsets[kLanes] = {}, odd_offsets[kLanes] = {};
      for (int lane = 0; lane < kLanes; lane += 2) {
        even_offsets[lane] = group_of_lane(lane);
        odd_offsets[lane] = group_of_lane(lane + 1);
      }
      even = Isa::load(even_offsets);
      odd = Isa::load(odd_offsets);
    }

    static uint32_t group_of_lane(int lane) {
      return static_cast<uint32_t>(kLanes / 4 * (lane % 4) + lane / 4);
    }
  };

  struct Half {
    I c0, c1, c2, c3;
  };

  MEZO_INLINE Half rounds(I c0, const Setup& s) {
    const I m0 = Isa::set1(kPhiloxM0), m1 = Isa::set1(kPhiloxM1);
    I c1 = s.uid, c2 = s.step, c3 = s.tail;
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const I product0 = Isa::mul_wide(m0, c0), product1 = Isa::mul_wide(m1, c2);
      c0 = Isa::bit_xor(Isa::high_half(product1), c1, s.key0[round]);
      c2 = Isa::bit_xor(Isa::high_half(product0), c3, s.key1[round]);
      c1 = product1;
      c3 = product0;
    }
    return {c0, c1, c2, c3};
  }

  MEZO_INLINE Words philox_batch(uint32_t c0, const Setup& s) {
    const I base = Isa::set1(c0);
    const Half a = rounds(Isa::add(base, s.even), s), b = rounds(Isa::add(base, s.odd), s);
    return {{Isa::interleave(a.c0, b.c0), Isa::interleave(a.c1, b.c1),
             Isa::interleave(a.c2, b.c2), Isa::interleave(a.c3, b.c3)}};
  }

  MEZO_INLINE F radius(I word) {
    const typename Isa::Mask is_big = Isa::at_least(word, kBigWord);
    const I x = Isa::invert_where(is_big, word);
    const F v = Isa::fma(Isa::float_of_u32(x), Isa::set1(kTwoM32), Isa::set1(kTwoM33));
    const I half = Isa::set1(kSqrtHalfBits);
    const I shifted = Isa::sub(Isa::bits(v), half);
    const F mantissa =
        Isa::floats(Isa::add(Isa::bit_and(shifted, Isa::set1(0x007FFFFFu)), half));
    const F e = Isa::zero_where(is_big, Isa::float_of_i32(Isa::template sra<23>(shifted)));
    const F f = Isa::select(is_big, Isa::negate(v), Isa::add(mantissa, Isa::set1(-1.0f)));
    const F f2 = Isa::mul(f, f);
    F p = Isa::fma(Isa::set1(kLogP7), f, Isa::set1(kLogP6));
    p = Isa::fma(p, f, Isa::set1(kLogP5));
    p = Isa::fma(p, f, Isa::set1(kLogP4));
    p = Isa::fma(p, f, Isa::set1(kLogP3));
    p = Isa::fma(p, f, Isa::set1(kLogP2));
    p = Isa::fma(p, f, Isa::set1(kLogP1));
    p = Isa::fma(p, f, Isa::set1(kLogP0));
    F y = Isa::fma(Isa::mul(f2, f), p, Isa::mul(e, Isa::set1(kLn2Lo)));
    y = Isa::add(f, Isa::fma(Isa::set1(-0.5f), f2, y));
    return Isa::sqrt(Isa::mul(Isa::set1(-2.0f), Isa::fma(e, Isa::set1(kLn2Hi), y)));
  }

  MEZO_INLINE void box_muller(I radius_word, I angle_word, F& z0,
                                                               F& z1) {
    const F t = Isa::mul(Isa::float_of_i32(Isa::template sll<2>(angle_word)), Isa::set1(kTwoM32));
    const F t2 = Isa::mul(t, t);
    const F s_poly = Isa::fma(Isa::fma(Isa::set1(kSinS2), t2, Isa::set1(kSinS1)), t2,
                              Isa::set1(kSinS0));
    const F s = Isa::fma(t, Isa::set1(kPio2Hi),
                         Isa::mul(t, Isa::fma(t2, s_poly, Isa::set1(kPio2Lo))));
    F c_poly = Isa::fma(Isa::fma(Isa::set1(kCosC3), t2, Isa::set1(kCosC2)), t2,
                        Isa::set1(kCosC1));
    c_poly = Isa::fma(c_poly, t2, Isa::set1(kCosC0));
    const F c = Isa::fma(t2, c_poly, Isa::set1(1.0f));
    // Bits 31 and 30 of the rounded angle are the quadrant.
    const I quadrant = Isa::add(angle_word, Isa::set1(0x20000000u));
    const typename Isa::Mask is_swapped = Isa::sign_mask(Isa::template sll<1>(quadrant));
    const I sign = Isa::set1(0x80000000u);
    const I cos_sign = Isa::bit_and(Isa::add(quadrant, Isa::set1(0x40000000u)), sign);
    const I sin_sign = Isa::bit_and(quadrant, sign);
    const F r = radius(radius_word);
    z0 = Isa::mul(r, Isa::flip(Isa::select(is_swapped, s, c), cos_sign));
    z1 = Isa::mul(r, Isa::flip(Isa::select(is_swapped, c, s), sin_sign));
  }

  MEZO_INLINE Normals normals(const Words& words) {
    Normals n;
    box_muller(words.w[0], words.w[1], n.z[0], n.z[1]);
    box_muller(words.w[2], words.w[3], n.z[2], n.z[3]);
    return n;
  }

  MEZO_INLINE void store(float* z, const Normals& n) {
    F t[4];
    Isa::transpose(n.z, t);
    for (int i = 0; i < 4; ++i) Isa::store(z + i * kLanes, t[i]);
  }

  static void gaussian(float* z, const Stream& stream, uint32_t c0, int64_t n) {
    const Setup setup(stream);
    for (int64_t i = 0; i < n; i += 4 * kLanes, c0 += kLanes) {
      store(z + i, normals(philox_batch(c0, setup)));
    }
  }

  static void generate(float* z, const Stream& stream, int64_t first, int64_t n) {
    if (is_rademacher(stream)) return generate_rademacher(z, stream, first, n);
    gaussian(z, stream, static_cast<uint32_t>(first >> 2), n);
  }

  // The two below serve tests: the same batch code, fed or read in the middle.
  static void words(uint32_t* out, const Stream& stream, uint32_t c0, int64_t n) {
    const Setup setup(stream);
    for (int64_t done = 0; done < n; done += kLanes) {
      const Words batch = philox_batch(c0 + static_cast<uint32_t>(done), setup);
      const Normals as_floats = {{Isa::floats(batch.w[0]), Isa::floats(batch.w[1]),
                                  Isa::floats(batch.w[2]), Isa::floats(batch.w[3])}};
      float buffer[4 * kLanes];
      store(buffer, as_floats);
      const int64_t groups = n - done < kLanes ? n - done : kLanes;
      memcpy(out + 4 * done, buffer, static_cast<size_t>(groups) * 4 * sizeof(uint32_t));
    }
  }

  static void from_words(float* z, const uint32_t* words, int64_t n) {
    for (int64_t done = 0; done < n; done += kLanes) {
      const int64_t groups = n - done < kLanes ? n - done : kLanes;
      uint32_t buffer[4 * kLanes] = {};
      memcpy(buffer, words + 4 * done, static_cast<size_t>(groups) * 4 * sizeof(uint32_t));
      F rows[4], columns[4];
      for (int i = 0; i < 4; ++i) rows[i] = Isa::floats(Isa::load(buffer + i * kLanes));
      Isa::transpose(rows, columns);
      const Words batch = {{Isa::bits(columns[0]), Isa::bits(columns[1]), Isa::bits(columns[2]),
                            Isa::bits(columns[3])}};
      float result[4 * kLanes];
      store(result, normals(batch));
      memcpy(z + 4 * done, result, static_cast<size_t>(groups) * 4 * sizeof(float));
    }
  }
};

}  // namespace
}  // namespace mezo
