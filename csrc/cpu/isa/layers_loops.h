// Norm, rotary embedding and gated activation of fp32 rows, written once over an instruction set
// `Isa`: the same bits on every one of them, and for a row whatever the other rows are.
#pragma once

#include "simd.h"
#include "vector_math.h"

namespace mezo {
namespace {

template <class Isa>
struct Layers {
  using F = typename Isa::F;
  using Math = VectorMath<Isa>;
  static constexpr int kLanes = Isa::kLanes;
  // A sum of squares is 16 running sums, whatever the width of a register, then a tree over them.
  static constexpr int kSums = 16;
  static constexpr int kRegisters = kSums / kLanes;

  // summed = x + residual (x without one), out = summed / sqrt(mean(summed^2) + eps) * weight
  static void rms_norm(const RmsNorm& p, int64_t row) {
    const int64_t n = p.width;
    const float* x = p.x + row * p.x_stride;
    float* out = p.out + row * n;
    F sums[kRegisters];
    for (int v = 0; v < kRegisters; ++v) sums[v] = Isa::set1(0.0f);
    if (p.residual != nullptr) {
      const float* residual = p.residual + row * p.residual_stride;
      float* summed = p.summed + row * n;
      add_squares(n, sums, [&](int64_t i) __attribute__((always_inline)) {
        const F sum = Isa::add(Math::load(x + i, n - i), Math::load(residual + i, n - i));
        Math::store(summed + i, sum, n - i);
        return sum;
      });
      x = summed;
    } else {
      add_squares(n, sums, [&](int64_t i) __attribute__((always_inline)) {
        return Math::load(x + i, n - i);
      });
    }
    float s[kSums];
    for (int v = 0; v < kRegisters; ++v) Isa::store(s + v * kLanes, sums[v]);
    for (int width = kSums / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) s[i] += s[i + width];
    }
    const F factor = Isa::set1(1.0f / __builtin_sqrtf(s[0] / static_cast<float>(n) + p.eps));
    for (int64_t i = 0; i < n; i += kLanes) {
      const F normed = Isa::mul(Math::load(x + i, n - i), factor);
      Math::store(out + i, Isa::mul(normed, Math::load(p.weight + i, n - i)), n - i);
    }
  }

  template <class Value>
  MEZO_INLINE void add_squares(int64_t n, F sums[kRegisters], Value&& value_at) {
    for (int64_t i = 0; i < n; i += kSums) {
      for (int v = 0; v < kRegisters && i + v * kLanes < n; ++v) {
        const F value = value_at(i + v * kLanes);
        sums[v] = Isa::fma(value, value, sums[v]);
      }
    }
  }

  // Each head's halves are the coordinates of points, turned by the row's angles.
  static void rotary(const Rotary& p, int64_t row) {
    const int64_t half = p.head_dim / 2;
    const float *cos = p.cos_sin + p.positions[row] * p.cos_sin_stride, *sin = cos + half;
    for (int64_t head = 0; head < p.heads; ++head) {
      const float *x = p.x + row * p.x_stride + head * p.head_dim, *y = x + half;
      float *x_out = p.out + (row * p.heads + head) * p.head_dim, *y_out = x_out + half;
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t left = half - i;
        const F a = Math::load(x + i, left), b = Math::load(y + i, left);
        const F c = Math::load(cos + i, left), s = Math::load(sin + i, left);
        Math::store(x_out + i, Isa::fma(a, c, Isa::negate(Isa::mul(b, s))), left);
        Math::store(y_out + i, Isa::fma(b, c, Isa::mul(a, s)), left);
      }
    }
  }

  // out = x / (1 + exp(-x)) * y, where x and y are the halves of a row
  static void silu_and_mul(const GatedRows& p, int64_t row) {
    const float *x = p.x + row * p.x_stride, *y = x + p.width;
    float* out = p.out + row * p.width;
    const F one = Isa::set1(1.0f), zero = Isa::set1(0.0f);
    for (int64_t i = 0; i < p.width; i += kLanes) {
      const int64_t left = p.width - i;
      const F gate = Math::load(x + i, left);
      const auto is_negative = Isa::less(gate, zero);
      const F size = Isa::select(is_negative, gate, Isa::negate(gate));
      const F e = Math::exp_nonpositive(size);
      const F sigmoid = Isa::div(Isa::select(is_negative, e, one), Isa::add(one, e));
      Math::store(out + i, Isa::mul(Isa::mul(gate, sigmoid), Math::load(y + i, left)), left);
    }
  }
};

}  // namespace
}  // namespace mezo
