// Plain C++ for every CPU: philox.h one group at a time, std::fma where there is no hardware fma.
#include "attention_loops.h"
#include "layers_loops.h"
#include "loops.h"
#include "lora_loops.h"

namespace mezo {
namespace {

void words(uint32_t* out, const Stream& stream, uint32_t c0, int64_t n) {
  for (int64_t i = 0; i < n; ++i) philox(stream, c0 + static_cast<uint32_t>(i), out + 4 * i);
}

void from_words(float* z, const uint32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gaussian_of_words(words + 4 * i, z + 4 * i);
}

void generate(float* z, const Stream& stream, int64_t first, int64_t n) {
  if (is_rademacher(stream)) return generate_rademacher(z, stream, first, n);
  for (int64_t i = 0; i < n; i += 4) direction_group(stream, (first + i) >> 2, z + i);
}

void add_gaussians(float* acc, const Combination& sum, int64_t uid, int64_t element, int64_t n) {
  for (int64_t k = 0; k < sum.size; ++k) {
    const Stream stream = stream_of(sum.directions[k], uid);
    for (int64_t first = element & ~int64_t{3}; first < element + n; first += 4) {
      float z[4];
      direction_group(stream, first >> 2, z);
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t position = first + i - element;
        if (position < 0 || position >= n) continue;
        acc[position] = fma_rn(sum.coefficients[k], z[i], acc[position]);
      }
    }
  }
}

struct Scalar {
  using F = float;
  using I = uint32_t;
  using Mask = bool;
  static constexpr int kLanes = 1;

  static I set1(uint32_t a) { return a; }
  static F set1(float a) { return a; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F a) { *p = a; }
  static I bits(F a) { return bits_of_float(a); }
  static F floats(I a) { return float_of_bits(a); }

  static I bit_and(I a, I b) { return a & b; }
  template <int kShift>
  static I sll(I a) {
    return a << kShift;
  }

  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return fma_rn(a, b, c); }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static float max_lane(F a) { return a; }

  static Mask less(F a, F b) { return a < b; }
  static F zero_where(Mask mask, F a) { return mask ? 0.0f : a; }
  static F select(Mask mask, F yes, F no) { return mask ? yes : no; }
  static F flip(F a, I sign) { return floats(bits(a) ^ sign); }
  static F negate(F a) { return flip(a, 0x80000000u); }
};

}  // namespace

const Ops& portable_ops() {
  static const Ops ops = {
      "portable",
      words,
      from_words,
      generate,
      add_gaussians,
      {load_float32, load_float16, load_bfloat16},
      {store_float32, store_float16, store_bfloat16},
      accumulate,
      {fma_store_float32, fma_store_float16, fma_store_bfloat16},
      Lora<Scalar>::shrink,
      Lora<Scalar>::expand,
      SharedPrefix<Scalar>::attend,
      Layers<Scalar>::rms_norm,
      Layers<Scalar>::rotary,
      Layers<Scalar>::silu_and_mul,
      VectorMath<Scalar>::exps,
      VectorMath<Scalar>::tanhs,
  };
  return ops;
}

}  // namespace mezo
