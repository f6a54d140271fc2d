// Norms, rotary embeddings and activations, in parallel over rows.
#include "layers.h"

#include "cpu/isa/ops.h"
#include "parallel.h"

namespace mezo {

void cpu_rms_norm(const RmsNorm& norm, int64_t rows, int threads) {
  const auto run = selected_ops().rms_norm;
  for_each_item(rows, threads, [&](int64_t row) { run(norm, row); });
}

void cpu_rotary(const Rotary& rotary, int64_t rows, int threads) {
  const auto run = selected_ops().rotary;
  for_each_item(rows, threads, [&](int64_t row) { run(rotary, row); });
}

void cpu_silu_and_mul(const GatedRows& gated, int64_t rows, int threads) {
  const auto run = selected_ops().silu_and_mul;
  for_each_item(rows, threads, [&](int64_t row) { run(gated, row); });
}

}  // namespace mezo
