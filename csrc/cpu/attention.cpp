// Attention of rows that share prefixes, in parallel over blocks of queries and KV heads.
#include "attention.h"

#include <math.h>

#include "cpu/isa/ops.h"
#include "parallel.h"

namespace mezo {
namespace {

// Here and not in the template, so that every instruction set calls one log.
void write_lse(float* lse, float max, float sum) {
  *lse = static_cast<float>(static_cast<double>(max) + log(static_cast<double>(sum)));
}

}  // namespace

void cpu_attention(Attention attention, const AttentionBlock* blocks, int64_t num_blocks,
                   int64_t kv_heads, int threads) {
  const Ops& ops = selected_ops();
  attention.load = ops.load[attention.dtype];
  attention.store = ops.store[attention.dtype];
  attention.write_lse = write_lse;
  for_each_item(num_blocks * kv_heads, threads, [&](int64_t item) {
    ops.attend(attention, blocks[item / kv_heads], item % kv_heads);
  });
}

}  // namespace mezo
