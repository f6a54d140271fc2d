// sample, and the hook for tests.
#include "launcher.cuh"
#include "walk.cuh"

namespace mezo {
namespace {

__global__ void __launch_bounds__(kThreads)
    sample_kernel(float* out, const __grid_constant__ TensorRow tensor,
                  const __grid_constant__ DirectionRow direction) {
  for_each_quad(tensor, blockIdx.x, [&](const Quad& quad) {
    float z[4] = {};
    quad.draw(AnyDraw{}, direction, static_cast<uint32_t>(tensor.uid), z);
    quad.visit([&](int j, int64_t row, int64_t col) { out[row * tensor.cols + col] = z[j]; });
  });
}

__global__ void __launch_bounds__(kThreads)
    normals_kernel(float4* z, const uint4* words, int64_t num_groups) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= num_groups) return;
  const uint4 four = words[group];
  const uint32_t input[4] = {four.x, four.y, four.z, four.w};
  float output[4];
  gaussian_of_words(input, output);
  z[group] = make_float4(output[0], output[1], output[2], output[3]);
}

int64_t blocks_for(int64_t size, int64_t per_block) { return (size + per_block - 1) / per_block; }

}  // namespace

const char* cuda_sample(float* out, const TensorRow& tensor, const DirectionRow& direction,
                        const CudaTarget& target) {
  const int64_t blocks = blocks_for(tensor.rows * tensor.cols, kWorkBlock);
  if (blocks == 0) return nullptr;
  return launch(target, blocks, kThreads, sample_kernel, out, tensor, direction);
}

const char* cuda_normals_of_words(float* z, const uint32_t* words, int64_t num_groups,
                                  const CudaTarget& target) {
  if (num_groups == 0) return nullptr;
  return launch(target, blocks_for(num_groups, kThreads), kThreads, normals_kernel,
                reinterpret_cast<float4*>(z), reinterpret_cast<const uint4*>(words), num_groups);
}

}  // namespace mezo
