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

// kRun neighbours: a vector, aligned to 16 bytes, or half of one, aligned to 16 bytes where it is
// fp32 and to 8 where its elements have 16 bits, two to a word.
template <int kRun>
__device__ __forceinline__ void load_float32_run(int64_t address, float values[kRun]) {
  for (int i = 0; i < kRun / 4; ++i) {
    const uint4 four = load_16_bytes(address + 16 * i);
    memcpy(values + 4 * i, &four, sizeof four);
  }
}

template <int kRun>
__device__ __forceinline__ void store_float32_run(int64_t address, const float values[kRun]) {
  for (int i = 0; i < kRun / 4; ++i) {
    uint4 four;
    memcpy(&four, values + 4 * i, sizeof four);
    store_16_bytes(address + 16 * i, four);
  }
}

template <int kRun>
__device__ __forceinline__ void load_word_run(int64_t address, uint32_t words[kRun / 2]) {
  if constexpr (kRun == kVector) {
    const uint4 packed = load_16_bytes(address);
    memcpy(words, &packed, sizeof packed);
  } else {
    const uint2 packed = load_8_bytes(address);
    memcpy(words, &packed, sizeof packed);
  }
}

template <int kRun>
__device__ __forceinline__ void store_word_run(int64_t address, const uint32_t words[kRun / 2]) {
  if constexpr (kRun == kVector) {
    store_16_bytes(address, make_uint4(words[0], words[1], words[2], words[3]));
  } else {
    store_8_bytes(address, make_uint2(words[0], words[1]));
  }
}

__device__ __forceinline__ void unpack_vector(int64_t dtype, const uint32_t words[kVector / 2],
                                              float values[kVector]) {
  if (dtype == kFloat16) {
    for (int i = 0; i < kVector / 2; ++i) unpack_float16(words[i], values + 2 * i);
  } else {
    for (int i = 0; i < kVector / 2; ++i) unpack_bfloat16(words[i], values + 2 * i);
  }
}

__device__ __forceinline__ void pack_vector(int64_t dtype, const float values[kVector],
                                            uint32_t words[kVector / 2]) {
  if (dtype == kFloat16) {
    for (int i = 0; i < kVector / 2; ++i) words[i] = pack_float16(values + 2 * i);
  } else {
    for (int i = 0; i < kVector / 2; ++i) words[i] = pack_bfloat16(values + 2 * i);
  }
}

}  // namespace
}  // namespace mezo
