// add_directions_: every element is read once, gets all directions in registers, and is written
// once.
#include "launcher.cuh"
#include "updates.cuh"

namespace mezo {
namespace {

template <int kRun, class Draw>
__device__ __forceinline__ void add_to_vectors(const CudaTables& tables, const Work& work,
                                               const CudaScalars& scalars, int count,
                                               const Draw& draw) {
  const VectorWalk<kRun> walk(tables, work);
  if (!walk.is_inside(0)) return;
  const TensorRow* tensor = tables.tensors + work.tensor;
  const int64_t data = tensor->data, row_stride = tensor->row_stride, dtype = tensor->dtype;
  float values[kVectorsPerThread][kVector] = {};
  uint32_t group[kVectorsPerThread][kVector / kRun];
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    walk.groups(v, group[v]);
    walk.load(data, dtype, row_stride, v, values[v]);
  }
  for_each_update(scalars, count, draw, [&](const typename Draw::Row& row, float coefficient) {
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      add_direction<kRun>(draw, row, coefficient, walk.shape.uid, group[v], values[v]);
    }
  });
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    walk.store(data, dtype, row_stride, v, values[v]);
  }
}

template <class Draw>
__device__ __forceinline__ void add_to_quads(const CudaTables& tables, const Work& work,
                                             const CudaScalars& scalars, int count,
                                             const Draw& draw) {
  const TensorRow tensor = tables.tensors[work.tensor];
  const auto uid = static_cast<uint32_t>(tensor.uid);
  for_each_quad(tensor, work.block, [&](const Quad& quad) {
    float values[4] = {};
    quad.visit([&](int j, int64_t row, int64_t col) {
      values[j] = load(tensor.data, tensor.dtype, row * tensor.row_stride + col);
    });
    for_each_update(scalars, count, draw, [&](const typename Draw::Row& row, float coefficient) {
      add_direction(draw, row, coefficient, uid, quad, values);
    });
    quad.visit([&](int j, int64_t row, int64_t col) {
      store(tensor.data, tensor.dtype, row * tensor.row_stride + col, values[j]);
    });
  });
}

// kVectorsOnly: all tensors of the plan are vector tensors, the usual case.
template <class Draw, int kRun, bool kVectorsOnly>
__global__ void __launch_bounds__(kThreads, Draw::kBlocksPerSm)
    add_kernel(const __grid_constant__ CudaTables tables,
               const __grid_constant__ CudaScalars scalars, const __grid_constant__ Draw draw) {
  const Work work = tables.work[blockIdx.x];
  const int count = *scalars.num_updates;
  // Nothing is pending: nothing moves.
  if (count == 0) return;
  if (kVectorsOnly || blockIdx.x < tables.num_vector) {
    add_to_vectors<kRun>(tables, work, scalars, count, draw);
  } else if (!kVectorsOnly) {
    add_to_quads(tables, work, scalars, count, draw);
  }
}

}  // namespace

const char* cuda_add_directions(const CudaTables& tables, const CudaScalars& scalars,
                                const CommonSeed& seed, Lanes lanes, const CudaTarget& target) {
  if (tables.num_work == 0 || scalars.max_updates == 0) return nullptr;
  const auto run = [&](auto kernel, const auto& draw) {
    return launch(target, tables.num_work, kThreads, kernel, tables, scalars, draw);
  };
  return with_lanes(lanes, [&](auto size) {
    constexpr int kRun = size;
    const GaussianDraw gaussian = {round_keys(seed.key0, seed.key1)};
    if (seed.domain == kDomainGaussian) {
      const bool is_all_vectors = tables.num_vector == tables.num_work;
      return is_all_vectors ? run(add_kernel<GaussianDraw, kRun, true>, gaussian)
                            : run(add_kernel<GaussianDraw, kRun, false>, gaussian);
    }
    if (seed.domain == kDomainRademacher) {
      return run(add_kernel<RademacherDraw, kRun, false>, RademacherDraw{gaussian.keys});
    }
    return run(add_kernel<AnyDraw, kRun, false>, AnyDraw{});
  });
}

}  // namespace mezo
