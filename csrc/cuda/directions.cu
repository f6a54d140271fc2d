// The CUDA backend: one thread per Philox group of four elements, one launch per tensor.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace mezo {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

// The elements of a group that belong to the tensor, as row and column of the shard.
struct Group {
  int64_t index;
  int64_t row[4], col[4];
  bool is_inside[4];
};

// Upper bound over all lines, so that (line, group) is a rectangle.
__host__ __device__ int64_t groups_per_line(const Lines& lines) { return lines.length / 4 + 2; }

__device__ Group group_of(const TensorRow& tensor, const Lines& lines, int64_t item) {
  const int64_t line = item / groups_per_line(lines);
  const int64_t begin = lines.first_element + line * lines.element_stride;
  Group group;
  group.index = (begin >> 2) + item % groups_per_line(lines);
  for (int j = 0; j < 4; ++j) {
    const int64_t offset = 4 * group.index + j - begin;
    group.is_inside[j] = offset >= 0 && offset < lines.length;
    const int64_t position = line * lines.length + offset;
    group.row[j] = position / tensor.cols;
    group.col[j] = position % tensor.cols;
  }
  return group;
}

__device__ float load(int64_t data, int64_t dtype, int64_t offset) {
  if (dtype == kFloat16) return __half2float(reinterpret_cast<const __half*>(data)[offset]);
  if (dtype == kBFloat16) {
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[offset]);
  }
  return reinterpret_cast<const float*>(data)[offset];
}

__device__ void store(int64_t data, int64_t dtype, int64_t offset, float value) {
  if (dtype == kFloat16) {
    reinterpret_cast<__half*>(data)[offset] = __float2half_rn(value);
  } else if (dtype == kBFloat16) {
    reinterpret_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16_rn(value);
  } else {
    reinterpret_cast<float*>(data)[offset] = value;
  }
}

__device__ void load_group(const TensorRow& tensor, const Group& group, float values[4]) {
  for (int j = 0; j < 4; ++j) {
    const int64_t offset = group.row[j] * tensor.row_stride + group.col[j];
    values[j] = group.is_inside[j] ? load(tensor.data, tensor.dtype, offset) : 0.0f;
  }
}

// Memory is a TensorRow or an OutputRow.
template <class Memory>
__device__ void store_group(const Memory& memory, const Group& group, const float values[4]) {
  for (int j = 0; j < 4; ++j) {
    if (!group.is_inside[j]) continue;
    store(memory.data, memory.dtype, group.row[j] * memory.row_stride + group.col[j], values[j]);
  }
}

__device__ void accumulate(const Combination& sum, int64_t uid, int64_t group, float values[4]) {
  for (int64_t k = 0; k < sum.size; ++k) {
    float z[4];
    direction_group(stream_of(sum.directions[k], uid), group, z);
    for (int j = 0; j < 4; ++j) values[j] = fma_rn(sum.coefficients[k], z[j], values[j]);
  }
}

template <class Body>
__device__ void for_each_group(const TensorRow& tensor, Body&& body) {
  const Lines lines = lines_of(tensor);
  const int64_t total = lines.count * groups_per_line(lines);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; item < total; item += stride) body(group_of(tensor, lines, item));
}

__global__ void sample_kernel(float* out, TensorRow tensor, const DirectionRow* direction) {
  const OutputRow memory = {reinterpret_cast<int64_t>(out), tensor.cols, kFloat32};
  for_each_group(tensor, [&](const Group& group) {
    float z[4];
    direction_group(stream_of(*direction, tensor.uid), group.index, z);
    store_group(memory, group, z);
  });
}

__global__ void add_directions_kernel(TensorRow tensor, Combination sum) {
  for_each_group(tensor, [&](const Group& group) {
    float values[4];
    load_group(tensor, group, values);
    accumulate(sum, tensor.uid, group.index, values);
    store_group(tensor, group, values);
  });
}

__global__ void perturb_kernel(TensorRow master, int64_t index, int64_t num_tensors,
                               Combination update, FanOut slots) {
  for_each_group(master, [&](const Group& group) {
    float values[4];
    load_group(master, group, values);
    if (update.size > 0) {
      accumulate(update, master.uid, group.index, values);
      store_group(master, group, values);
    }
    for (int64_t d = 0; d < slots.num_directions; ++d) {
      float z[4];
      direction_group(stream_of(slots.directions[d], master.uid), group.index, z);
      for (int64_t k = 0; k < slots.num_slots; ++k) {
        if (slots.indices[k] != d) continue;
        float perturbed[4];
        for (int j = 0; j < 4; ++j) perturbed[j] = fma_rn(slots.scales[k], z[j], values[j]);
        store_group(slots.outputs[k * num_tensors + index], group, perturbed);
      }
    }
    for (int64_t k = 0; k < slots.num_slots; ++k) {
      if (slots.indices[k] < 0) store_group(slots.outputs[k * num_tensors + index], group, values);
    }
  });
}

int num_blocks(const TensorRow& tensor) {
  const Lines lines = lines_of(tensor);
  const int64_t blocks = (lines.count * groups_per_line(lines) + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Calls launch(tensor, index, blocks, stream) for each tensor that has elements.
template <class Launch>
const char* for_each_tensor(const TensorRow* tensors, int64_t num_tensors, const CudaTarget& target,
                            Launch&& launch) {
  cudaError_t error = cudaSetDevice(target.device);
  for (int64_t i = 0; error == cudaSuccess && i < num_tensors; ++i) {
    const int blocks = num_blocks(tensors[i]);
    if (blocks == 0) continue;
    launch(tensors[i], i, blocks, static_cast<cudaStream_t>(target.stream));
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* cuda_sample(float* out, const TensorRow& tensor, const DirectionRow* direction,
                        const CudaTarget& target) {
  return for_each_tensor(&tensor, 1, target,
                         [&](const TensorRow& row, int64_t, int blocks, cudaStream_t stream) {
                           sample_kernel<<<blocks, kThreads, 0, stream>>>(out, row, direction);
                         });
}

const char* cuda_add_directions(const TensorRow* tensors, int64_t num_tensors,
                                const Combination& sum, const CudaTarget& target) {
  return for_each_tensor(tensors, num_tensors, target,
                         [&](const TensorRow& row, int64_t, int blocks, cudaStream_t stream) {
                           add_directions_kernel<<<blocks, kThreads, 0, stream>>>(row, sum);
                         });
}

const char* cuda_perturb(const TensorRow* masters, int64_t num_tensors, const Combination& update,
                         const FanOut& slots, const CudaTarget& target) {
  return for_each_tensor(masters, num_tensors, target,
                         [&](const TensorRow& row, int64_t i, int blocks, cudaStream_t stream) {
                           perturb_kernel<<<blocks, kThreads, 0, stream>>>(row, i, num_tensors,
                                                                           update, slots);
                         });
}

}  // namespace mezo
