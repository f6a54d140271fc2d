// Loads and stores of fp32, fp16 and bf16 memory as fp32 registers, rounded to nearest even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "access.cuh"

namespace mezo {
namespace {

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ __forceinline__ float load(int64_t data, int64_t dtype, int64_t offset) {
  if (dtype == kFloat32) return load_float32(data + 4 * offset);
  const uint16_t bits = load_16_bits(data + 2 * offset);
  if (dtype == kFloat16) return __half2float(bits_as<__half>(bits));
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ void store(int64_t data, int64_t dtype, int64_t offset, float value) {
  if (dtype == kFloat32) {
    store_float32(data + 4 * offset, value);
  } else if (dtype == kFloat16) {
    store_16_bits(data + 2 * offset, bits_as<uint16_t>(__float2half_rn(value)));
  } else {
    store_16_bits(data + 2 * offset, bits_as<uint16_t>(__float2bfloat16_rn(value)));
  }
}

__device__ __forceinline__ void unpack_float16(uint32_t pair, float* values) {
  const float2 both = __half22float2(bits_as<__half2>(pair));
  values[0] = both.x;
  values[1] = both.y;
}

__device__ __forceinline__ void unpack_bfloat16(uint32_t pair, float* values) {
  values[0] = float_of_bits(pair << 16);
  values[1] = float_of_bits(pair & 0xFFFF0000u);
}

__device__ __forceinline__ uint32_t pack_float16(const float* values) {
  return bits_as<uint32_t>(__floats2half2_rn(values[0], values[1]));
}

__device__ __forceinline__ uint32_t pack_bfloat16(const float* values) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(values[0], values[1]));
}

__device__ __forceinline__ void load_float32_vector(int64_t address, float values[8]) {
  for (int i = 0; i < 2; ++i) {
    const uint4 four = load_16_bytes(address + 16 * i);
    memcpy(values + 4 * i, &four, sizeof four);
  }
}

__device__ __forceinline__ void store_float32_vector(int64_t address, const float values[8]) {
  for (int i = 0; i < 2; ++i) {
    uint4 four;
    memcpy(&four, values + 4 * i, sizeof four);
    store_16_bytes(address + 16 * i, four);
  }
}

// Vector `vector` (kVector elements, aligned to 16 bytes) from `data` on.
__device__ __forceinline__ void load_vector(int64_t data, int64_t dtype, int64_t vector,
                                            float values[8]) {
  if (dtype == kFloat32) return load_float32_vector(data + 32 * vector, values);
  const uint4 packed = load_16_bytes(data + 16 * vector);
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
  for (int i = 0; i < 4; ++i) {
    if (dtype == kFloat16) {
      unpack_float16(pairs[i], values + 2 * i);
    } else {
      unpack_bfloat16(pairs[i], values + 2 * i);
    }
  }
}

__device__ __forceinline__ void store_vector(int64_t data, int64_t dtype, int64_t vector,
                                             const float values[8]) {
  if (dtype == kFloat32) return store_float32_vector(data + 32 * vector, values);
  uint4 packed;
  if (dtype == kFloat16) {
    packed = make_uint4(pack_float16(values), pack_float16(values + 2), pack_float16(values + 4),
                        pack_float16(values + 6));
  } else {
    packed = make_uint4(pack_bfloat16(values), pack_bfloat16(values + 2), pack_bfloat16(values + 4),
                        pack_bfloat16(values + 6));
  }
  store_16_bytes(data + 16 * vector, packed);
}

}  // namespace
}  // namespace mezo
