// Entry points of the CPU backend. Pointers are host addresses; results do not depend on the number
// of threads.
#pragma once

#include "step.h"
#include "cpu/isa/ops.h"

namespace mezo {

// The instruction set in use: "auto" picks the best one of this CPU. Returns false for one it lacks.
bool select_ops(const char* name);
const Ops& selected_ops();

void cpu_sample(float* out, const TensorRow& tensor, const DirectionRow& direction, int threads);

void cpu_add_directions(const TensorRow* tensors, int64_t num_tensors, const Combination& sum,
                        int threads);

void cpu_perturb(const TensorRow* masters, int64_t num_tensors, const Combination& update,
                 const FanOut& slots, int threads);

void cpu_advance(const StepState& state);

// Rows of fp32 numbers, and matrices of adapters by slot.
struct Rows {
  float* data;
  int64_t stride, width;
};
struct Slots {
  const float* data;
  int64_t slot_stride, row_stride;
};
// Rows start .. stop - 1 of a batch belong to the adapter in a slot.
struct LoraSegment {
  int64_t start, stop, slot;
  float scaling;
};
struct LoraBatch {
  const LoraSegment* segments;
  int64_t num_segments;
};

// h <- scaling x A^T; rows of h outside of the segments are not written.
void cpu_lora_shrink(const LoraBatch& batch, const Rows& x, const Slots& a, const Rows& h,
                     int threads);

// out[:, slice s] += h[:, s r .. (s + 1) r] B^T, where offsets[s] .. offsets[s + 1] are its columns.
void cpu_lora_expand(const LoraBatch& batch, const Rows& h, const Slots& b, const Rows& out,
                     const int64_t* offsets, int64_t num_slices, int threads);

// Attends from all blocks, for each KV head. The caller has checked that slots lie in the caches.
void cpu_attention(Attention attention, const AttentionBlock* blocks, int64_t num_blocks,
                   int64_t kv_heads, int threads);

// Layers of a model over rows. The caller has checked that positions lie in the table.
void cpu_rms_norm(const RmsNorm& norm, int64_t rows, int threads);
void cpu_rotary(const Rotary& rotary, int64_t rows, int threads);
void cpu_silu_and_mul(const GatedRows& gated, int64_t rows, int threads);

bool has_openmp();

}  // namespace mezo
