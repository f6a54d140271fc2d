// Compiles CUDA sources with a host compiler and runs the kernels thread by thread, so that their
// index arithmetic and their order of operations can be tested without a GPU.
//
// Where threads wait for one another, a block's threads are coroutines: one runs until it waits,
// then the next one does. Races between them are not seen here.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "cuda/target.h"
#include "table.h"

#define MEZO_CUDA_ACCESS
#define MEZO_CUDA_LAUNCHER
#define MEZO_CUDA_MMA
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time.
#undef __shared__
#define __shared__ static

static thread_local uint3 threadIdx, blockIdx;

namespace {

// A barrier of some threads of a block.
struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

// The threads of one block.
class Block {
 public:
  template <class Body>
  static void run(int num_threads, const Body& body) {
    Block block(num_threads);
    current() = &block;
    block.body_ = [](const void* function) { (*static_cast<const Body*>(function))(); };
    block.function_ = &body;
    while (block.next_ < num_threads) block.start();
    while (block.num_finished_ < num_threads) {
      for (const auto& coroutine : block.coroutines_) {
        if (!coroutine->is_done) block.resume(*coroutine);
      }
    }
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  // Returns once `count` threads wait at the barrier.
  void wait(Barrier& barrier, int count) {
    const int64_t generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (barrier.generation == generation) {
      Coroutine& mine = *running_;
      const uint3 thread = threadIdx;
      swapcontext(&mine.context, &scheduler_);
      threadIdx = thread;
    }
  }

  const int num_threads;
  Barrier barrier;
  int and_of_all = 1;
  // Of each warp, for an exchange between its lanes.
  std::vector<Barrier> warps;
  std::vector<uint32_t> words;

 private:
  static constexpr size_t kStackBytes = 128 << 10;
  struct Coroutine {
    ucontext_t context;
    bool is_done = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
  };

  explicit Block(int num_threads)
      : num_threads(num_threads), warps((num_threads + 31) / 32), words(warps.size() * 32 * 6) {}

  void start() {
    coroutines_.push_back(std::make_unique<Coroutine>());
    ucontext_t& context = coroutines_.back()->context;
    getcontext(&context);
    context.uc_stack.ss_sp = coroutines_.back()->stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = &scheduler_;
    makecontext(&context, &Block::work, 0);
    resume(*coroutines_.back());
  }

  void resume(Coroutine& coroutine) {
    running_ = &coroutine;
    swapcontext(&scheduler_, &coroutine.context);
  }

  // Runs threads as long as there are any that have not begun: one after another, where none waits.
  static void work() {
    Block& block = *current();
    Coroutine& mine = *block.running_;
    while (block.next_ < block.num_threads) {
      threadIdx = {static_cast<unsigned>(block.next_++), 0, 0};
      block.body_(block.function_);
      ++block.num_finished_;
    }
    mine.is_done = true;
  }

  std::vector<std::unique_ptr<Coroutine>> coroutines_;
  ucontext_t scheduler_;
  Coroutine* running_ = nullptr;
  int next_ = 0, num_finished_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* function_ = nullptr;
};

static inline void __syncthreads() {
  Block& block = *Block::current();
  block.wait(block.barrier, block.num_threads);
}

// The kernels have one such barrier, so that nothing needs to be reset.
static inline int __syncthreads_and(int value) {
  Block::current()->and_of_all &= value != 0;
  __syncthreads();
  return Block::current()->and_of_all;
}

}  // namespace

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
inline uint2 load_8_bytes(int64_t address) { return at<uint2>(aligned(address, 8)); }
inline void store_8_bytes(int64_t address, const uint2& value) {
  at<uint2>(aligned(address, 8)) = value;
}
inline float load_float32(int64_t address) { return at<float>(aligned(address, 4)); }
inline uint16_t load_16_bits(int64_t address) { return at<uint16_t>(aligned(address, 2)); }
inline void store_float32(int64_t address, float value) { at<float>(aligned(address, 4)) = value; }
inline void store_16_bits(int64_t address, uint16_t value) {
  at<uint16_t>(aligned(address, 2)) = value;
}

// Element of a word of two.
template <int64_t kDType>
double half_of(uint32_t word, int which) {
  const uint32_t bits = which ? word >> 16 : word & 0xFFFF;
  if (kDType == kBFloat16) return float_of_bits(bits << 16);
  __half value;
  memcpy(&value, &bits, sizeof value);
  return __half2float(value);
}

// The product of bench/experiments/csrc/mma.cuh: every lane shows its words to its warp, then sums up its own
// four results, exactly but for one rounding.
template <int64_t kDType>
void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  Block& block = *Block::current();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t* words = block.words.data() + warp * 32 * 6;
  memcpy(words + lane * 6, a, 16);
  memcpy(words + lane * 6 + 4, b, 8);
  block.wait(block.warps[warp], 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, upper = k / 8;
      const uint32_t left = words[(row % 8 * 4 + t) * 6 + 2 * upper + row / 8];
      const uint32_t right = words[(col * 4 + t) * 6 + 4 + upper];
      sum += half_of<kDType>(left, k % 2) * half_of<kDType>(right, k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
  block.wait(block.warps[warp], 32);
}

template <class... Parameters, class... Arguments>
const char* launch(const CudaTarget&, int64_t blocks, int num_threads,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    Block::run(num_threads, [&] { kernel(arguments...); });
  }
  return nullptr;
}

}  // namespace
}  // namespace mezo
