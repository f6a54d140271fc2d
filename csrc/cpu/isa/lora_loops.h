// The two thin products of LoRA on vector registers, written once over an instruction set `Isa`.
//
// Both give the same bits on every instruction set, and a row's bits do not depend on other rows.
#pragma once

#include "simd.h"

namespace mezo {
namespace {

template <class Isa>
struct Lora {
  using F = typename Isa::F;
  // A dot product is 16 running sums, whatever the width of a register, then a tree over them.
  static constexpr int kSums = 16;
  static constexpr int kRegisters = kSums / Isa::kLanes;
  // Columns of h at a time, whose trees are summed together; rows as the registers allow.
  static constexpr int kCols = 4;
  static constexpr int kRows = Isa::kLanes == 16 ? 4 : 1;
  // Columns of `out` that stay in registers, for two rows, while the ranks are added.
  static constexpr int kExpandCols = Isa::kLanes == 1 ? 8 : 4 * Isa::kLanes;

  // h[t, j] = scale * sum_k x[t, k] a[j, k]
  static void shrink(const Shrink& p) {
    int64_t t = 0;
    for (; t + kRows <= p.rows; t += kRows) shrink_rows<kRows>(p, t);
    for (; t < p.rows; ++t) shrink_rows<1>(p, t);
  }

  template <int kTall>
  static void shrink_rows(const Shrink& p, int64_t t) {
    int64_t j = 0;
    for (; j + kCols <= p.cols; j += kCols) dots<kTall, kCols>(p, t, j);
    for (; j < p.cols; ++j) dots<kTall, 1>(p, t, j);
  }

  template <int kTall, int kWide>
  static void dots(const Shrink& p, int64_t t, int64_t j) {
    F sums[kTall][kRegisters][kWide];
    const float *x[kTall], *a[kWide];
    for (int r = 0; r < kTall; ++r) {
      x[r] = p.x + (t + r) * p.x_stride;
      for (int v = 0; v < kRegisters; ++v) {
        for (int c = 0; c < kWide; ++c) sums[r][v][c] = Isa::set1(0.0f);
      }
    }
    for (int c = 0; c < kWide; ++c) a[c] = p.a + (j + c) * p.a_stride;
    const int64_t whole = p.depth / kSums * kSums;
    for (int64_t k = 0; k < whole; k += kSums) add_products<kTall, kWide>(x, a, k, sums);
    if (whole < p.depth) {
      // The rest, filled up with zeros.
      const size_t size = static_cast<size_t>(p.depth - whole) * sizeof(float);
      float x_rest[kTall][kSums] = {}, a_rest[kWide][kSums] = {};
      for (int r = 0; r < kTall; ++r) {
        memcpy(x_rest[r], x[r] + whole, size);
        x[r] = x_rest[r];
      }
      for (int c = 0; c < kWide; ++c) {
        memcpy(a_rest[c], a[c] + whole, size);
        a[c] = a_rest[c];
      }
      add_products<kTall, kWide>(x, a, 0, sums);
    }
    for (int r = 0; r < kTall; ++r) {
      float* h = p.h + (t + r) * p.h_stride + j;
      float quarters[4][kWide];
      add_quads<kWide>(sums[r], quarters);
      for (int c = 0; c < kWide; ++c) {
        h[c] = p.scale * ((quarters[0][c] + quarters[1][c]) + (quarters[2][c] + quarters[3][c]));
      }
    }
  }

  template <int kTall, int kWide>
  MEZO_INLINE void add_products(const float* const x[kTall], const float* const a[kWide], int64_t k,
                                F sums[kTall][kRegisters][kWide]) {
    for (int v = 0; v < kRegisters; ++v) {
      F factors[kWide];
      for (int c = 0; c < kWide; ++c) factors[c] = Isa::load(a[c] + k + v * Isa::kLanes);
      for (int r = 0; r < kTall; ++r) {
        const F value = Isa::load(x[r] + k + v * Isa::kLanes);
        for (int c = 0; c < kWide; ++c) sums[r][v][c] = Isa::fma(value, factors[c], sums[r][v][c]);
      }
    }
  }

  // The 16 running sums s of each column: quarter i is (s[4i] + s[4i+1]) + (s[4i+2] + s[4i+3]).
  template <int kWide>
  MEZO_INLINE void add_quads(const F sums[kRegisters][kWide], float quarters[4][kWide]) {
    if constexpr (kWide == 4 && Isa::kLanes > 1) {
      for (int v = 0; v < kRegisters; ++v) {
        F turned[4];
        Isa::transpose(sums[v], turned);
        const F quads = Isa::add(Isa::add(turned[0], turned[1]), Isa::add(turned[2], turned[3]));
        Isa::store(quarters[v * Isa::kLanes / 4], quads);
      }
    } else {
      for (int c = 0; c < kWide; ++c) {
        float s[kSums];
        for (int v = 0; v < kRegisters; ++v) Isa::store(s + v * Isa::kLanes, sums[v][c]);
        for (int i = 0; i < 4; ++i) {
          quarters[i][c] = (s[4 * i] + s[4 * i + 1]) + (s[4 * i + 2] + s[4 * i + 3]);
        }
      }
    }
  }

  // out[t, d] <- fma(h[t, q], b[d, q], out[t, d]) for q = 0 .. rank - 1
  static void expand(const Expand& p) {
    float block[kMaxRankBlock * kExpandCols];
    int64_t d = 0;
    for (; d + kExpandCols <= p.cols; d += kExpandCols) {
      // A long rank is added in several blocks, in its order.
      for (int64_t first = 0; first < p.rank; first += kMaxRankBlock) {
        const int64_t left = p.rank - first;
        const int n = static_cast<int>(left < kMaxRankBlock ? left : kMaxRankBlock);
        for (int c = 0; c < kExpandCols; ++c) {
          for (int q = 0; q < n; ++q) {
            block[q * kExpandCols + c] = p.b[(d + c) * p.b_stride + first + q];
          }
        }
        int64_t t = 0;
        for (; t + 2 <= p.rows; t += 2) add_block<2>(p, block, n, t, d, first);
        for (; t < p.rows; ++t) add_block<1>(p, block, n, t, d, first);
      }
    }
    for (; d < p.cols; ++d) {
      const float* b = p.b + d * p.b_stride;
      for (int64_t t = 0; t < p.rows; ++t) {
        float sum = p.out[t * p.out_stride + d];
        for (int64_t q = 0; q < p.rank; ++q) sum = fma_rn(p.h[t * p.h_stride + q], b[q], sum);
        p.out[t * p.out_stride + d] = sum;
      }
    }
  }

  template <int kTall>
  static void add_block(const Expand& p, const float* block, int n, int64_t t, int64_t d,
                        int64_t first) {
    constexpr int kVectors = kExpandCols / Isa::kLanes;
    F sums[kTall][kVectors];
    for (int r = 0; r < kTall; ++r) {
      const float* out = p.out + (t + r) * p.out_stride + d;
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::load(out + v * Isa::kLanes);
    }
    for (int q = 0; q < n; ++q) {
      F h[kTall];
      for (int r = 0; r < kTall; ++r) h[r] = Isa::set1(p.h[(t + r) * p.h_stride + first + q]);
      for (int v = 0; v < kVectors; ++v) {
        const F b = Isa::load(block + q * kExpandCols + v * Isa::kLanes);
        for (int r = 0; r < kTall; ++r) sums[r][v] = Isa::fma(h[r], b, sums[r][v]);
      }
    }
    for (int r = 0; r < kTall; ++r) {
      float* out = p.out + (t + r) * p.out_stride + d;
      for (int v = 0; v < kVectors; ++v) Isa::store(out + v * Isa::kLanes, sums[r][v]);
    }
  }

  // Ranks of a block of b, transposed in the L1 cache.
  static constexpr int kMaxRankBlock = 64;
};

}  // namespace
}  // namespace mezo
