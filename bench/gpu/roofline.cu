// What the device can do at most, for the roofline of bench/directions.py: the rate of the
// multiplications of Philox, and copies in the patterns of our kernels.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kChains = 8;
constexpr int kThreads = 256;

// Eight independent chains per thread, of one IMAD.WIDE.U32 and one LOP3 per link, as in Philox. The
// two run on different pipes, so the time is that of the slower one.
__global__ void wide_multiply_kernel(uint64_t* sink, int rounds) {
  uint32_t values[kChains];
  for (int i = 0; i < kChains; ++i) values[i] = threadIdx.x + i;
#pragma unroll 8
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      asm volatile("{.reg .u32 low, high; .reg .u64 both; mul.wide.u32 both, %0, 0xD2511F53;"
                   " mov.b64 {low, high}, both; lop3.b32 %0, low, high, 0x5A827999, 0x96;}"
                   : "+r"(values[i]));
    }
  }
  uint32_t sum = 0;
  for (int i = 0; i < kChains; ++i) sum += values[i];
  if (sum == 1) *sink = sum;
}

__device__ uint4 rounded(const float4& a, const float4& b) {
  const __nv_bfloat162 pairs[4] = {__floats2bfloat162_rn(a.x, a.y), __floats2bfloat162_rn(a.z, a.w),
                                   __floats2bfloat162_rn(b.x, b.y), __floats2bfloat162_rn(b.z, b.w)};
  return *reinterpret_cast<const uint4*>(pairs);
}

// fp32 in, two bf16 out: 8 bytes per element; with kUpdates the fp32 go back too: 12 bytes.
template <bool kUpdates>
__global__ void fan_out_kernel(float4* master, uint4* plus, uint4* minus, int64_t vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= vectors) return;
  float4 a = master[2 * i], b = master[2 * i + 1];
  if (kUpdates) {
    a.x += 1.0f;
    master[2 * i] = a;
    master[2 * i + 1] = b;
  }
  plus[i] = rounded(a, b);
  a.x -= 1.0f;
  minus[i] = rounded(a, b);
}

// fp32 in place: 8 bytes per element.
__global__ void in_place_kernel(float4* master, int64_t vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= vectors) return;
  float4 a = master[2 * i], b = master[2 * i + 1];
  a.x += 1.0f;
  master[2 * i] = a;
  master[2 * i + 1] = b;
}

unsigned blocks_for(int64_t vectors) {
  return static_cast<unsigned>((vectors + kThreads - 1) / kThreads);
}

}  // namespace

extern "C" int wide_multiplies(void* sink, int blocks, int rounds, void* stream) {
  wide_multiply_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<uint64_t*>(sink), rounds);
  return cudaGetLastError();
}

extern "C" int fan_out(void* master, void* plus, void* minus, int64_t elements, int updates,
                       void* stream) {
  const auto kernel = updates ? fan_out_kernel<true> : fan_out_kernel<false>;
  kernel<<<blocks_for(elements / 8), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<float4*>(master), static_cast<uint4*>(plus), static_cast<uint4*>(minus),
      elements / 8);
  return cudaGetLastError();
}

extern "C" int in_place(void* master, int64_t elements, void* stream) {
  in_place_kernel<<<blocks_for(elements / 8), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<float4*>(master), elements / 8);
  return cudaGetLastError();
}
