// Plain C++ for every CPU: philox.h one group at a time, std::fma where there is no hardware fma.
#include "loops.h"
#include "lora.h"

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

struct Scalar {
  using F = float;
  static constexpr int kLanes = 1;

  static F set1(float a) { return a; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F a) { *p = a; }
  static F fma(F a, F b, F c) { return fma_rn(a, b, c); }
};

}  // namespace

const Ops& portable_ops() {
  static const Ops ops = {
      "portable",
      words,
      from_words,
      generate,
      {load_float32, load_float16, load_bfloat16},
      {store_float32, store_float16, store_bfloat16},
      accumulate,
      {fma_store_float32, fma_store_float16, fma_store_bfloat16},
      Lora<Scalar>::shrink,
      Lora<Scalar>::expand,
  };
  return ops;
}

}  // namespace mezo
