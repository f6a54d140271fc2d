// Attention of rows that share prefixes, on the CPU.
#pragma once

#include <stdint.h>

namespace mezo {

// Keys of a tile, queries of a block, largest head dim.
constexpr int kAttentionTile = 64;
constexpr int kAttentionQueries = 48;
constexpr int kAttentionMaxDim = 256;

// Tokens or slots x heads x dim, the last one contiguous; strides in bytes.
struct AttentionTensor {
  char* data;
  int64_t token_stride, head_stride;

  void* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// A block of packed queries of a group: the heads of a KV head, token by token, row by row, from a
// head of a token of a row on. `row` is an index into Attention::rows, two entries a row. All
// fields are 64 bits wide: a block is a row of an int64 tensor.
struct AttentionBlock {
  int64_t prefix, prefix_len;  // range of Attention::slots
  int64_t row, place, head;
  int64_t count;
};

struct Attention {
  AttentionTensor q, k, v, k_cache, v_cache, out;
  float* lse;  // [tokens, heads], or null
  const int64_t* rows;  // first token and end of each row, group by group
  const int64_t* slots;
  int64_t heads, heads_per_kv_head, dim, v_dim, dtype;
  float scale, soft_cap;
  // Of the dtype; filled in by the driver.
  void (*load)(float* acc, const void* src, int64_t n);
  void (*store)(void* dst, const float* src, int64_t n);
  void (*write_lse)(float* lse, float max, float sum);
};

// Attends from all blocks, for each KV head. The caller has checked that slots lie in the caches.
void cpu_attention(Attention attention, const AttentionBlock* blocks, int64_t num_blocks,
                   int64_t kv_heads, int threads);

}  // namespace mezo
