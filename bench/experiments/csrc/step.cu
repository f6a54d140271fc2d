// The scalars of a step on a CUDA device.
#include "step.h"

#include "cuda/launcher.cuh"

namespace mezo {
namespace {

constexpr int kStepThreads = 256;

// One block, so that all directions can agree on whether the step counts.
__global__ void __launch_bounds__(kStepThreads)
    advance_kernel(const __grid_constant__ StepState state) {
  bool is_finite = true;
  for (int64_t k = threadIdx.x; k < state.num_directions; k += kStepThreads) {
    is_finite &= advance_direction(state, k);
  }
  const bool is_applied = __syncthreads_and(is_finite);
  if (threadIdx.x == 0) {
    *state.num_updates = is_applied ? static_cast<int32_t>(state.num_directions) : 0;
  }
}

}  // namespace

const char* cuda_advance(const StepState& state, const CudaTarget& target) {
  return launch(target, 1, kStepThreads, advance_kernel, state);
}

}  // namespace mezo
