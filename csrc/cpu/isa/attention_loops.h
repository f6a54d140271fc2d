// Attention of a block of queries that share a prefix, written once over an instruction set `Isa`.
//
// The bits of a query depend only on its row and its prefix, and they are the same on every
// instruction set. Keys are read in tiles of kTile, from the prefix's first one and then from the
// row's own first one. A score is one chain of fma over the head dim, a tile's output one over its
// keys; across tiles the softmax is online: out <- fma(out, exp(old max - max), tile's output). The
// weights are added in kSums running sums, whatever the width of a register, with a tree over them
// at the end.
#pragma once

#include "simd.h"
#include "vector_math.h"

namespace mezo {
namespace {

constexpr float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class Isa>
struct SharedPrefix {
  using F = typename Isa::F;
  using Math = VectorMath<Isa>;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kTile = kAttentionTile;
  static constexpr int kQueries = kAttentionQueries;
  static constexpr int kMaxDim = kAttentionMaxDim;
  static constexpr int kSums = 16;
  static constexpr int kRegisters = kSums / kLanes;
  // Queries x vectors of a block that stays in registers.
  static constexpr int kTall = 6;
  static constexpr int kWide = kLanes == 8 ? 2 : 4;
  // Queries where there is one vector of keys: fewer chains would wait for their own results.
  static constexpr int kTallNarrow = 12;

  // The queries of one token are neighbours, the tokens of a row, the rows of a group.
  struct Query {
    int64_t token, head;
    int64_t row;    // entry of Attention::rows
    int64_t place;  // of the token in its row
  };

  // What a block needs, for the most part in the L1 cache; the parts in use are compact.
  struct Scratch {
    alignas(64) float keys[kMaxDim * kTile];    // [dim, kTile]: a tile of keys, transposed
    alignas(64) float copies[kTile * kMaxDim];  // rows of keys or values that need converting
    alignas(64) float q[kQueries * kMaxDim];
    alignas(64) float out[kQueries * kMaxDim];
    alignas(64) float scores[kQueries * kTile];  // then weights
    alignas(64) float sums[kQueries * kSums];
    alignas(64) float max[kQueries];
    alignas(64) float decay[kQueries];  // exp(max before the tile - max after it)
    const float* rows[kTile];           // of the values of the tile
    Query queries[kQueries];
  };

  template <int kCount>
  struct Constant {
    static constexpr int value = kCount;
  };

  // visit(Constant<n>) for n = 1 .. kMax.
  template <int kMax, class Visit>
  MEZO_INLINE void with_constant(int n, Visit&& visit) {
    if constexpr (kMax > 1) {
      if (n < kMax) return with_constant<kMax - 1>(n, visit);
    }
    visit(Constant<kMax>{});
  }

  // visit(Constant<rows>, Constant<columns>, first column): at most kTall rows of vectors, cut into
  // blocks of at most kWide of them.
  template <class Visit>
  MEZO_INLINE void with_blocks(int tall, int vectors, Visit&& visit) {
    for (int v = 0; v < vectors; v += kWide) {
      with_constant<kTall>(tall, [&](auto t) __attribute__((always_inline)) {
        with_constant<kWide>(min_of(vectors - v, kWide), [&](auto w)
                             __attribute__((always_inline)) { visit(t, w, v); });
      });
    }
  }

  static int min_of(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
  static int64_t padded(int64_t dim) { return (dim + kSums - 1) / kSums * kSums; }
  static int vectors_of(int count) { return (count + kLanes - 1) / kLanes; }

  static void attend(const Attention& p, const AttentionBlock& block, int64_t kv_head) {
    Scratch s;
    const int count = static_cast<int>(block.count);
    const int64_t* slots = p.slots + block.prefix;
    const int64_t size = p.dtype == kFloat32 ? 4 : 2;
    prefetch(p.k_cache, kv_head, p.dim * size, 0, min_of(block.prefix_len, kTile),
             [&](int k) { return slots[k]; });
    load_queries(p, block, kv_head, s);
    const int64_t width = padded(p.v_dim);
    for (int64_t i = 0; i < count * width; ++i) s.out[i] = 0.0f;
    for (int i = 0; i < count * kSums; ++i) s.sums[i] = 0.0f;
    for (int i = 0; i < kQueries; ++i) {
      s.max[i] = -__builtin_inff();
      s.decay[i] = 0.0f;
    }

    for (int64_t first = 0; first < block.prefix_len; first += kTile) {
      const int64_t left = block.prefix_len - first;
      const int keys = min_of(left, kTile);
      const auto slot_of = [&](int k) { return slots[first + k]; };
      load_keys(p, p.k_cache, kv_head, keys, slot_of, s);
      prefetch(p.v_cache, kv_head, p.v_dim * size, 0, keys, slot_of);
      score(p, s, 0, count, [&](int) { return keys; });
      load_values(p, p.v_cache, kv_head, keys, slot_of, s);
      prefetch(p.k_cache, kv_head, p.dim * size, kTile, min_of(left, 2 * kTile), slot_of);
      weigh(p, s, 0, count, [&](int) { return keys; });
    }
    for (int begin = 0; begin < count;) {
      int end = begin + 1;
      while (end < count && s.queries[end].row == s.queries[begin].row) ++end;
      attend_row(p, kv_head, s, begin, end);
      begin = end;
    }
    for (int i = 0; i < count; ++i) write(p, s, i);
  }

  // Queries begin .. end - 1, all of one row, over the row's own keys up to each one's token.
  static void attend_row(const Attention& p, int64_t kv_head, Scratch& s, int begin, int end) {
    const int64_t start = p.rows[s.queries[begin].row];
    const int64_t num_keys = s.queries[end - 1].place + 1;
    for (int64_t first = 0; first < num_keys; first += kTile) {
      const int keys = min_of(num_keys - first, kTile);
      while (s.queries[begin].place < first) ++begin;
      const auto seen = [&](int i) { return min_of(s.queries[i].place + 1 - first, keys); };
      const auto token_of = [&](int k) { return start + first + k; };
      load_keys(p, p.k, kv_head, keys, token_of, s);
      score(p, s, begin, end, seen);
      load_values(p, p.v, kv_head, keys, token_of, s);
      weigh(p, s, begin, end, seen);
    }
  }

  static void load_queries(const Attention& p, const AttentionBlock& block, int64_t kv_head,
                           Scratch& s) {
    int64_t row = block.row, place = block.place, head = block.head;
    const int64_t width = padded(p.dim);
    for (int i = 0; i < block.count; ++i) {
      while (place == p.rows[row + 1] - p.rows[row]) {
        row += 2;
        place = 0;
      }
      Query& query = s.queries[i];
      query = {p.rows[row] + place, kv_head * p.heads_per_kv_head + head, row, place};
      float* q = s.q + i * width;
      const void* from = p.q.at(query.token, query.head);
      if (p.dtype == kFloat32) {
        multiply(q, static_cast<const float*>(from), p.scale, p.dim);
      } else {
        p.load(q, from, p.dim);
        multiply(q, q, p.scale, p.dim);
      }
      if (++head == p.heads_per_kv_head) {
        head = 0;
        ++place;
      }
    }
  }

  MEZO_INLINE void multiply(float* to, const float* from, float factor, int64_t n) {
    const F factors = Isa::set1(factor);
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
      Isa::store(to + d, Isa::mul(Isa::load(from + d), factors));
    }
    for (; d < n; ++d) to[d] = from[d] * factor;
  }

  // Pointers to rows in fp32: into the tensor where they can be read in `multiple`s as they are,
  // else to copies that are filled up with zeros.
  template <class PlaceOf>
  static void find_rows(const Attention& p, const AttentionTensor& tensor, int64_t kv_head,
                        int64_t dim, int multiple, int keys, PlaceOf&& place_of, Scratch& s) {
    const bool is_direct = p.dtype == kFloat32 && dim % multiple == 0;
    const int64_t width = padded(dim);
    for (int k = 0; k < keys; ++k) {
      const void* row = tensor.at(place_of(k), kv_head);
      if (is_direct) {
        s.rows[k] = static_cast<const float*>(row);
        continue;
      }
      float* copy = s.copies + k * width;
      p.load(copy, row, dim);
      for (int64_t d = dim; d < width; ++d) copy[d] = 0.0f;
      s.rows[k] = copy;
    }
  }

  // Slots are scattered: the hardware does not see which rows come next.
  template <class PlaceOf>
  MEZO_INLINE void prefetch(const AttentionTensor& tensor, int64_t kv_head, int64_t nbytes,
                            int begin, int end, PlaceOf&& place_of) {
    for (int k = begin; k < end; ++k) {
      const char* row = static_cast<const char*>(tensor.at(place_of(k), kv_head));
      for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(row + i);
    }
  }

  template <class PlaceOf>
  static void load_keys(const Attention& p, const AttentionTensor& tensor, int64_t kv_head,
                        int keys, PlaceOf&& place_of, Scratch& s) {
    find_rows(p, tensor, kv_head, p.dim, 4, keys, place_of, s);
    // The last vector is filled up with any key: its scores are masked.
    const int filled = vectors_of(keys) * kLanes;
    for (int k = keys; k < filled; ++k) s.rows[k] = s.rows[keys - 1];
    for (int k = 0; k < filled; k += kLanes) {
      for (int64_t d = 0; d < p.dim; d += 4) {
        F columns[4];
        turn(s.rows + k, d, columns);
        for (int i = 0; i < 4; ++i) Isa::store(s.keys + (d + i) * kTile + k, columns[i]);
      }
    }
  }

  // columns[i] = elements d + i of kLanes rows.
  MEZO_INLINE void turn(const float* const* rows, int64_t d, F columns[4]) {
    if constexpr (kLanes == 1) {
      for (int i = 0; i < 4; ++i) columns[i] = Isa::load(rows[0] + d + i);
    } else {
      F quads[4];
      for (int i = 0; i < 4; ++i) quads[i] = Isa::load_quads(rows + i, d);
      Isa::transpose(quads, columns);
    }
  }

  template <class PlaceOf>
  static void load_values(const Attention& p, const AttentionTensor& tensor, int64_t kv_head,
                          int keys, PlaceOf&& place_of, Scratch& s) {
    find_rows(p, tensor, kv_head, p.v_dim, kLanes, keys, place_of, s);
  }

  // Scores of queries begin .. end - 1, the new maxima, and then the weights in the scores' place.
  // Query i sees the first seen(i) keys of the tile; seen never decreases.
  template <class Seen>
  static void score(const Attention& p, Scratch& s, int begin, int end, Seen&& seen) {
    int narrow = begin;
    while (narrow < end && seen(narrow) <= kLanes) ++narrow;
    for (int i = begin; i < narrow; i += kTallNarrow) {
      with_constant<kTallNarrow>(min_of(narrow - i, kTallNarrow), [&](auto t)
                                 __attribute__((always_inline)) {
        dots<decltype(t)::value, 1>(p, s, i, 0);
      });
    }
    for (int i = narrow; i < end; i += kTall) {
      const int tall = min_of(end - i, kTall);
      const int vectors = vectors_of(seen(i + tall - 1));
      with_blocks(tall, vectors, [&](auto t, auto w, int v) __attribute__((always_inline)) {
        dots<decltype(t)::value, decltype(w)::value>(p, s, i, v * kLanes);
      });
    }
    for (int i = begin; i < end; ++i) {
      const float old = s.max[i];
      find_max(p, s, i, seen(i));
      s.decay[i] = old;
    }
    // Whole registers: what they hold of other queries is not used any more, or not yet.
    for (int i = begin / kLanes * kLanes; i < end; i += kLanes) {
      const F x = Isa::add(Isa::load(s.decay + i), Isa::negate(finite(Isa::load(s.max + i))));
      Isa::store(s.decay + i, Math::exp_nonpositive(x));
    }
    for (int i = begin; i < end; ++i) exponentiate(s, i, seen(i));
  }

  // A maximum of -inf, all scores so far are, counts as 0: exp(-inf - 0) is 0, not NaN.
  MEZO_INLINE F finite(F max) {
    return Isa::zero_where(Isa::less(max, Isa::set1(-3.402823466e38f)), max);
  }

  template <int kRows, int kVectors>
  static void dots(const Attention& p, Scratch& s, int query, int key) {
    const int64_t width = padded(p.dim);
    const float *q = s.q + query * width, *keys = s.keys + key;
    F sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::set1(0.0f);
    }
    for (int64_t d = 0; d < p.dim; ++d) {
      F column[kVectors];
      for (int v = 0; v < kVectors; ++v) column[v] = Isa::load(keys + d * kTile + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const F value = Isa::set1(q[r * width + d]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::fma(value, column[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* scores = s.scores + (query + r) * kTile + key;
      for (int v = 0; v < kVectors; ++v) Isa::store(scores + v * kLanes, sums[r][v]);
    }
  }

  static void find_max(const Attention& p, Scratch& s, int query, int keys) {
    float* scores = s.scores + query * kTile;
    const int filled = vectors_of(keys) * kLanes;
    if (p.soft_cap != 0.0f) {
      const F cap = Isa::set1(p.soft_cap), inverse = Isa::set1(1.0f / p.soft_cap);
      for (int k = 0; k < filled; k += kLanes) {
        Isa::store(scores + k, Isa::mul(cap, Math::tanh(Isa::mul(inverse, Isa::load(scores + k)))));
      }
    }
    F largest = Isa::set1(s.max[query]);
    int k = 0;
    for (; k + kLanes <= keys; k += kLanes) largest = Isa::max(largest, Isa::load(scores + k));
    if (k < keys) {
      const F lanes = Isa::load(kLaneNumbers), count = Isa::set1(static_cast<float>(keys - k));
      const F rest = Isa::select(Isa::less(lanes, count), Isa::load(scores + k),
                                 Isa::set1(-__builtin_inff()));
      Isa::store(scores + k, rest);
      largest = Isa::max(largest, rest);
    }
    s.max[query] = Isa::max_lane(largest);
  }

  static void exponentiate(Scratch& s, int query, int keys) {
    float *weights = s.scores + query * kTile, *sums = s.sums + query * kSums;
    const F max = Isa::negate(finite(Isa::set1(s.max[query]))), decay = Isa::set1(s.decay[query]);
    for (int r = 0; r < kRegisters; ++r) {
      F sum = Isa::mul(Isa::load(sums + r * kLanes), decay);
      for (int k = r * kLanes; k < keys; k += kSums) {
        const F weight = Math::exp_nonpositive(Isa::add(Isa::load(weights + k), max));
        Isa::store(weights + k, weight);
        sum = Isa::add(sum, weight);
      }
      Isa::store(sums + r * kLanes, sum);
    }
  }

  // Adds the weighted values of the tile. Only queries that see the same keys go together, so that
  // no weight of 0 meets a value that its query does not see.
  template <class Seen>
  static void weigh(const Attention& p, Scratch& s, int begin, int end, Seen&& seen) {
    const int vectors = vectors_of(static_cast<int>(p.v_dim));
    for (int i = begin; i < end;) {
      const int keys = seen(i);
      int tall = 1;
      while (tall < kTall && i + tall < end && seen(i + tall) == keys) ++tall;
      with_blocks(tall, vectors, [&](auto t, auto w, int v) __attribute__((always_inline)) {
        add_values<decltype(t)::value, decltype(w)::value>(p, s, i, v * kLanes, keys);
      });
      i += tall;
    }
  }

  template <int kRows, int kVectors>
  static void add_values(const Attention& p, Scratch& s, int query, int column, int keys) {
    const float* weights = s.scores + query * kTile;
    F sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::set1(0.0f);
    }
    for (int k = 0; k < keys; ++k) {
      F values[kVectors];
      for (int v = 0; v < kVectors; ++v) values[v] = Isa::load(s.rows[k] + column + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const F weight = Isa::set1(weights[r * kTile + k]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::fma(weight, values[v], sums[r][v]);
      }
    }
    const int64_t width = padded(p.v_dim);
    for (int r = 0; r < kRows; ++r) {
      float* out = s.out + (query + r) * width + column;
      const F decay = Isa::set1(s.decay[query + r]);
      for (int v = 0; v < kVectors; ++v) {
        const F old = Isa::load(out + v * kLanes);
        Isa::store(out + v * kLanes, Isa::fma(old, decay, sums[r][v]));
      }
    }
  }

  static void write(const Attention& p, Scratch& s, int i) {
    const float* sums = s.sums + i * kSums;
    float quarters[4];
    for (int j = 0; j < 4; ++j) {
      const float* four = sums + 4 * j;
      quarters[j] = (four[0] + four[1]) + (four[2] + four[3]);
    }
    const float sum = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
    // No weight at all, every score is -inf: the empty state, 0 and -inf.
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    float* out = s.out + i * padded(p.v_dim);
    const Query& query = s.queries[i];
    void* to = p.out.at(query.token, query.head);
    if (p.dtype == kFloat32) {
      multiply(static_cast<float*>(to), out, factor, p.v_dim);
    } else {
      multiply(out, out, factor, p.v_dim);
      p.store(to, out, p.v_dim);
    }
    if (p.lse != nullptr) p.write_lse(p.lse + query.token * p.heads + query.head, s.max[i], sum);
  }
};

}  // namespace
}  // namespace mezo
