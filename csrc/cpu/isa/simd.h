// Exact Gaussians on vector registers, written once over an instruction set `Isa`. The arithmetic
// is that of philox.h, operation by operation.
//
// `Isa::Mask` is what at_least and bit_30_mask return: lanes of ones, or lanes whose sign bit
// counts, or a mask register.
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

  // What stays the same over all directions of a run: the keys, and group offsets inside a batch.
  struct Setup {
    I key0[kPhiloxRounds], key1[kPhiloxRounds];
    I even, odd;

    Setup(uint32_t seed0, uint32_t seed1) {
      const RoundKeys keys = round_keys(seed0, seed1);
      for (int round = 0; round < kPhiloxRounds; ++round) {
        key0[round] = Isa::set1(keys.key0(round));
        key1[round] = Isa::set1(keys.key1(round));
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

  // The first two rounds of a stream, of which only c0 differs from group to group: what is left
  // of them are the two products below, and these words to xor.
  struct Opening {
    uint32_t first2, second0, second2, second3;

    explicit Opening(const Stream& s) {
      const SeedKeys keys = {s.key0, s.key1};
      const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * s.step;
      const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ s.uid ^ keys.key0(0);
      const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * c0;
      first2 = s.tail ^ keys.key1(0);
      second0 = static_cast<uint32_t>(product1) ^ keys.key0(1);
      second2 = static_cast<uint32_t>(product0 >> 32) ^ keys.key1(1);
      second3 = static_cast<uint32_t>(product0);
    }
    Opening() = default;
  };

  struct Half {
    I c0, c1, c2, c3;
  };

  // A product of the groups of a batch, in the even lanes and in the odd ones.
  struct Groups {
    I even, odd;
  };

  // M0 * c0 of the groups from c0 on.
  MEZO_INLINE Groups first_products(uint32_t c0, const Setup& s) {
    const I m0 = Isa::set1(kPhiloxM0), base = Isa::set1(c0);
    return {Isa::mul_wide(m0, Isa::add(base, s.even)), Isa::mul_wide(m0, Isa::add(base, s.odd))};
  }

  // M1 * c2 of the second round; streams that differ in the step only have it in common, too.
  MEZO_INLINE Groups second_products(const Groups& groups, uint32_t first2) {
    const I m1 = Isa::set1(kPhiloxM1), word = Isa::set1(first2);
    return {Isa::mul_wide(m1, Isa::bit_xor(Isa::high_half(groups.even), word)),
            Isa::mul_wide(m1, Isa::bit_xor(Isa::high_half(groups.odd), word))};
  }

  MEZO_INLINE Half rounds(I group, I second, const Opening& opening, const Setup& s) {
    const I m0 = Isa::set1(kPhiloxM0), m1 = Isa::set1(kPhiloxM1);
    I c0 = Isa::bit_xor(Isa::high_half(second), Isa::set1(opening.second0));
    I c1 = second;
    I c2 = Isa::bit_xor(group, Isa::set1(opening.second2));
    I c3 = Isa::set1(opening.second3);
#pragma GCC unroll 8
    for (int round = 2; round < kPhiloxRounds; ++round) {
      const I product0 = Isa::mul_wide(m0, c0), product1 = Isa::mul_wide(m1, c2);
      c0 = Isa::bit_xor(Isa::high_half(product1), c1, s.key0[round]);
      c2 = Isa::bit_xor(Isa::high_half(product0), c3, s.key1[round]);
      c1 = product1;
      c3 = product0;
    }
    return {c0, c1, c2, c3};
  }

  MEZO_INLINE Words philox_batch(const Groups& first, const Groups& second,
                                 const Opening& opening, const Setup& s) {
    const Half a = rounds(first.even, second.even, opening, s);
    const Half b = rounds(first.odd, second.odd, opening, s);
    return {{Isa::interleave(a.c0, b.c0), Isa::interleave(a.c1, b.c1),
             Isa::interleave(a.c2, b.c2), Isa::interleave(a.c3, b.c3)}};
  }
  MEZO_INLINE Words philox_batch(uint32_t c0, const Opening& opening, const Setup& s) {
    const Groups first = first_products(c0, s);
    return philox_batch(first, second_products(first, opening.first2), opening, s);
  }

  MEZO_INLINE F radius(I word) {
    const typename Isa::Mask is_big = Isa::at_least(word, kBigWord);
    const I x = Isa::invert_where(is_big, word);
    const F v = Isa::fma(Isa::float_of_u32(x), Isa::set1(kTwoM32), Isa::set1(kTwoM33));
    const I exponent = Isa::bit_and(Isa::sub(Isa::bits(v), Isa::set1(kSqrtHalfBits)),
                                    Isa::set1(0xFF800000u));
    const F mantissa = Isa::floats(Isa::sub(Isa::bits(v), exponent));
    const F e23 = Isa::zero_where(is_big, Isa::float_of_i32(exponent));
    const F f = Isa::select(is_big, Isa::negate(v), Isa::add(mantissa, Isa::set1(-1.0f)));
    const F f2 = Isa::mul(f, f);
    F p = Isa::fma(Isa::set1(kLogP7), f, Isa::set1(kLogP6));
    p = Isa::fma(p, f, Isa::set1(kLogP5));
    p = Isa::fma(p, f, Isa::set1(kLogP4));
    p = Isa::fma(p, f, Isa::set1(kLogP3));
    p = Isa::fma(p, f, Isa::set1(kLogP2));
    p = Isa::fma(p, f, Isa::set1(kLogP1));
    p = Isa::fma(p, f, Isa::set1(kLogP0));
    const F y = Isa::fma(Isa::mul(f2, f), p, Isa::mul(e23, Isa::set1(kTwoM23 * kLn2Lo)));
    const F minus_2y =
        Isa::fma(Isa::set1(-2.0f), f, Isa::fma(Isa::set1(-2.0f), y, f2));
    return Isa::sqrt(Isa::fma(e23, Isa::set1(-2.0f * kTwoM23 * kLn2Hi), minus_2y));
  }

  MEZO_INLINE void box_muller(I radius_word, I angle_word, F& z0, F& z1) {
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
    const typename Isa::Mask is_swapped = Isa::bit_30_mask(quadrant);
    const F r = radius(radius_word);
    z0 = Isa::mul(r, Isa::flip_by_sign(Isa::select(is_swapped, s, c),
                                       Isa::add(quadrant, Isa::set1(0x40000000u))));
    z1 = Isa::mul(r, Isa::flip_by_sign(Isa::select(is_swapped, c, s), quadrant));
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
    const Setup setup(stream.key0, stream.key1);
    const Opening opening(stream);
    for (int64_t i = 0; i < n; i += 4 * kLanes, c0 += kLanes) {
      store(z + i, normals(philox_batch(c0, opening, setup)));
    }
  }

  static void generate(float* z, const Stream& stream, int64_t first, int64_t n) {
    if (is_rademacher(stream)) return generate_rademacher(z, stream, first, n);
    gaussian(z, stream, static_cast<uint32_t>(first >> 2), n);
  }

  // A direction of a sum, made ready for one tensor.
  struct Term {
    Opening opening;
    float coefficient;
  };

  // The terms go over a batch that stays in registers, in the order of z's vectors.
  MEZO_INLINE void add_terms(float* acc, uint32_t c0, const Term* terms, int64_t num_terms,
                             const Setup& setup) {
    const Groups first = first_products(c0, setup);
    uint32_t first2 = terms[0].opening.first2;
    Groups second = second_products(first, first2);
    F loaded[4], sum[4];
    for (int i = 0; i < 4; ++i) loaded[i] = Isa::load(acc + i * kLanes);
    Isa::transpose(loaded, sum);
    for (int64_t k = 0; k < num_terms; ++k) {
      const Opening& opening = terms[k].opening;
      if (opening.first2 != first2) {
        first2 = opening.first2;
        second = second_products(first, first2);
      }
      const Normals n = normals(philox_batch(first, second, opening, setup));
      const F c = Isa::set1(terms[k].coefficient);
      for (int i = 0; i < 4; ++i) sum[i] = Isa::fma(c, n.z[i], sum[i]);
    }
    store(acc, {{sum[0], sum[1], sum[2], sum[3]}});
  }

  static void add_gaussians(float* acc, const Combination& sum, int64_t uid, int64_t element,
                            int64_t n) {
    constexpr int64_t kBatch = 4 * kLanes, kTerms = 64;
    const Stream first_stream = stream_of(sum.directions[0], uid);
    const Setup setup(first_stream.key0, first_stream.key1);
    Term terms[kTerms];
    for (int64_t done = 0; done < sum.size; done += kTerms) {
      const int64_t num_terms = sum.size - done < kTerms ? sum.size - done : kTerms;
      for (int64_t k = 0; k < num_terms; ++k) {
        terms[k] = {Opening(stream_of(sum.directions[done + k], uid)), sum.coefficients[done + k]};
      }
      for (int64_t first = element & ~int64_t{3}; first < element + n; first += kBatch) {
        const uint32_t c0 = static_cast<uint32_t>(first >> 2);
        const int64_t begin = first < element ? element : first;
        const int64_t end = first + kBatch < element + n ? first + kBatch : element + n;
        float* place = acc + (begin - element);
        if (end - begin == kBatch) {
          add_terms(place, c0, terms, num_terms, setup);
          continue;
        }
        float buffer[kBatch] = {};
        const size_t size = static_cast<size_t>(end - begin) * sizeof(float);
        memcpy(buffer + (begin - first), place, size);
        add_terms(buffer, c0, terms, num_terms, setup);
        memcpy(place, buffer + (begin - first), size);
      }
    }
  }

  // The two below serve tests: the same batch code, fed or read in the middle.
  static void words(uint32_t* out, const Stream& stream, uint32_t c0, int64_t n) {
    const Setup setup(stream.key0, stream.key1);
    const Opening opening(stream);
    for (int64_t done = 0; done < n; done += kLanes) {
      const Words batch = philox_batch(c0 + static_cast<uint32_t>(done), opening, setup);
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
