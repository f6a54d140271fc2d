// Accesses of addresses from tables. PTX, because a pointer made from an integer may lead anywhere
// for the compiler, and generic accesses are slower than those of global memory.
#ifndef MEZO_CUDA_ACCESS
#define MEZO_CUDA_ACCESS

#include "table.h"

namespace mezo {
namespace {

__device__ __forceinline__ uint4 load_16_bytes(int64_t address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void store_16_bytes(int64_t address, const uint4& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint2 load_8_bytes(int64_t address) {
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address));
  return value;
}

__device__ __forceinline__ void store_8_bytes(int64_t address, const uint2& value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(value.x), "r"(value.y)
               : "memory");
}

__device__ __forceinline__ float load_float32(int64_t address) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ uint16_t load_16_bits(int64_t address) {
  uint16_t value;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ void store_float32(int64_t address, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_16_bits(int64_t address, uint16_t value) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(value) : "memory");
}

}  // namespace
}  // namespace mezo

#endif
