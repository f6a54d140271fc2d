// Compiles csrc/cuda/*.cu with a host compiler and runs the kernels thread by thread, so that their
// index arithmetic and their order of operations can be tested without a GPU.
//
// The kernels share nothing between threads; the one that has a barrier is launched as one block,
// and a launch of one block runs real threads.
#pragma once

#include <cuda_runtime.h>
#include <pthread.h>

#include <thread>
#include <vector>

#include "cuda/launch.h"

#define MEZO_CUDA_ACCESS
#define MEZO_CUDA_LAUNCHER
#define __launch_bounds__(...)
#define __grid_constant__

static thread_local uint3 threadIdx, blockIdx;

struct Barrier {
  pthread_barrier_t gate;
  int and_of_all = 1;
};
static Barrier* current_barrier = nullptr;

static inline int __syncthreads_and(int value) {
  if (!value) __atomic_store_n(&current_barrier->and_of_all, 0, __ATOMIC_SEQ_CST);
  pthread_barrier_wait(&current_barrier->gate);
  return __atomic_load_n(&current_barrier->and_of_all, __ATOMIC_SEQ_CST);
}

static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

static inline int __ffs(int value) { return __builtin_ffs(value); }

namespace mezo {
namespace {

template <class T>
T& at(int64_t address) {
  return *reinterpret_cast<T*>(address);
}

// A misaligned vector access is an error on the device, and one here.
inline int64_t aligned(int64_t address, int64_t size) {
  if (address % size != 0) __builtin_trap();
  return address;
}

inline uint4 load_16_bytes(int64_t address) { return at<uint4>(aligned(address, 16)); }
inline void store_16_bytes(int64_t address, const uint4& value) {
  at<uint4>(aligned(address, 16)) = value;
}
inline float load_float32(int64_t address) { return at<float>(aligned(address, 4)); }
inline uint16_t load_16_bits(int64_t address) { return at<uint16_t>(aligned(address, 2)); }
inline void store_float32(int64_t address, float value) { at<float>(aligned(address, 4)) = value; }
inline void store_16_bits(int64_t address, uint16_t value) {
  at<uint16_t>(aligned(address, 2)) = value;
}

template <class... Parameters, class... Arguments>
const char* launch(const CudaTarget&, int64_t blocks, int num_threads,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  const auto run = [&](unsigned block, unsigned thread) {
    blockIdx = {block, 0, 0};
    threadIdx = {thread, 0, 0};
    kernel(arguments...);
  };
  if (blocks == 1) {
    Barrier barrier;
    current_barrier = &barrier;
    pthread_barrier_init(&barrier.gate, nullptr, static_cast<unsigned>(num_threads));
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; ++t) threads.emplace_back(run, 0u, static_cast<unsigned>(t));
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&barrier.gate);
    return nullptr;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for (int t = 0; t < num_threads; ++t) {
      run(static_cast<unsigned>(block), static_cast<unsigned>(t));
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace mezo
