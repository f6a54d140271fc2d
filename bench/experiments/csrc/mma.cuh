// One product of the tensor cores.
#ifndef MEZO_CUDA_MMA
#define MEZO_CUDA_MMA

#include "table.h"

namespace mezo {
namespace {

// c += a b for a warp: a is 16 x 16, b 16 x 8, both fp16 or bf16, c 16 x 8 in fp32. With
// g = lane / 4 and t = lane % 4, two elements of 16 bits a word (PTX ISA, mma.m16n8k16):
//   a: rows g, g + 8, g, g + 8, columns 2 t and 2 t + 1, for the last two words 8 further on
//   b: column g, rows 2 t and 2 t + 1, for the second word 8 further on
//   c: rows g, g, g + 8, g + 8, columns 2 t and 2 t + 1 in turn
// Volatile, so that it is not moved to where only some lanes use what it gives.
template <int64_t kDType>
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  static_assert(kDType == kFloat16 || kDType == kBFloat16, "tensor cores take 16 bits here");
  if constexpr (kDType == kFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace
}  // namespace mezo

#endif
