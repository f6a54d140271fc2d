// perturb_into: update the masters, then write every slot from them, in one pass over the masters.
#include <algorithm>
#include <map>

#include "launcher.cuh"
#include "updates.cuh"

namespace mezo {
namespace {

// Slots of one launch. More slots need further launches, which have no update.
constexpr int kMaxSlots = 256;

// The slots in the order in which they are written: direction by direction, then the plain copies.
// Slot slots[i] uses directions[d] for i in ends[d - 1] .. ends[d] - 1.
struct SlotOrder {
  int32_t num_directions, num_slots;
  int32_t directions[kMaxSlots];
  uint16_t ends[kMaxSlots];
  uint8_t slots[kMaxSlots];
};

// What a launch adds to the tables: where its first slot lies.
struct SlotList {
  const OutputRow* outputs;
  const DirectionRow* directions;
  const float* scales;
};

// ---- the usual case: +eps and -eps (any two scales) of one z, at most one direction of an update

// A slot's memory in registers.
struct Target {
  int64_t data, row_stride;
  int32_t dtype;

  __device__ __forceinline__ explicit Target(const OutputRow& row)
      : data(row.data), row_stride(row.row_stride), dtype(static_cast<int32_t>(row.dtype)) {}
};

template <class Draw, int kRun, bool kHasUpdate>
__global__ void __launch_bounds__(kThreads, Draw::kBlocksPerSm - kHasUpdate)
    pair_kernel(const __grid_constant__ CudaTables tables,
                const __grid_constant__ CudaScalars scalars, const __grid_constant__ SlotList slots,
                const __grid_constant__ Draw draw) {
  const Work work = tables.work[blockIdx.x];
  const VectorWalk<kRun> walk(tables, work);
  if (!walk.is_inside(0)) return;
  // All loads are issued at once, ahead of the arithmetic.
  const Target master(*reinterpret_cast<const OutputRow*>(tables.tensors + work.tensor));
  const Target outputs[2] = {Target(slots.outputs[work.tensor]),
                             Target(slots.outputs[tables.num_tensors + work.tensor])};
  const float scales[2] = {slots.scales[0], slots.scales[1]};
  const typename Draw::Row row = draw.load_row(slots.directions);
  const bool is_updated = kHasUpdate && *scalars.num_updates > 0;
  const float coefficient = kHasUpdate ? scalars.factors[0] : 0.0f;
  const auto update = kHasUpdate ? draw.load_row(scalars.directions) : row;
  float values[kVectorsPerThread][kVector] = {};
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    walk.load(master.data, kFloat32, master.row_stride, v, values[v]);
  }
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    if (!walk.is_inside(v)) return;
    uint32_t group[kVector / kRun];
    walk.groups(v, group);
    if (is_updated) {
      add_direction<kRun>(draw, update, coefficient, walk.shape.uid, group, values[v]);
      walk.store(master.data, kFloat32, master.row_stride, v, values[v]);
    }
    float z[kVector];
    draw_vector<kRun>(draw, row, walk.shape.uid, group, z);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float perturbed[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) perturbed[i] = fma_rn(scales[k], z[i], values[v][i]);
      walk.store(outputs[k].data, outputs[k].dtype, outputs[k].row_stride, v, perturbed);
    }
  }
}

// ---- any slots, any tensors

template <int kRun, class Draw>
__device__ __forceinline__ void perturb_vectors(const CudaTables& tables, const Work& work,
                                                const CudaScalars& scalars, const SlotList& slots,
                                                const SlotOrder& order, const Draw& draw,
                                                int num_updates) {
  const VectorWalk<kRun> walk(tables, work);
  const TensorRow* master = tables.tensors + work.tensor;
  const int64_t data = master->data, row_stride = master->row_stride;
#pragma unroll 1
  for (int v = 0; v < kVectorsPerThread; ++v) {
    if (!walk.is_inside(v)) return;
    uint32_t group[kVector / kRun];
    walk.groups(v, group);
    float values[kVector] = {};
    walk.load(data, kFloat32, row_stride, v, values);
    for_each_update(scalars, num_updates, draw,
                    [&](const typename Draw::Row& row, float coefficient) {
                      add_direction<kRun>(draw, row, coefficient, walk.shape.uid, group, values);
                    });
    if (num_updates > 0) walk.store(data, kFloat32, row_stride, v, values);
    int i = 0;
    const auto write = [&](const float z[kVector], int end) {
#pragma unroll 1
      for (; i < end; ++i) {
        const int slot = order.slots[i];
        const OutputRow& out = slots.outputs[slot * tables.num_tensors + work.tensor];
        float perturbed[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          perturbed[j] = z ? fma_rn(slots.scales[slot], z[j], values[j]) : values[j];
        }
        walk.store(out.data, out.dtype, out.row_stride, v, perturbed);
      }
    };
#pragma unroll 1
    for (int d = 0; d < order.num_directions; ++d) {
      float z[kVector];
      draw_vector<kRun>(draw, draw.load_row(slots.directions + order.directions[d]),
                        walk.shape.uid, group, z);
      write(z, order.ends[d]);
    }
    write(nullptr, order.num_slots);
  }
}

template <class Draw>
__device__ __forceinline__ void perturb_quads(const CudaTables& tables, const Work& work,
                                              const CudaScalars& scalars, const SlotList& slots,
                                              const SlotOrder& order, const Draw& draw,
                                              int num_updates) {
  const TensorRow master = tables.tensors[work.tensor];
  const auto uid = static_cast<uint32_t>(master.uid);
  for_each_quad(master, work.block, [&](const Quad& quad) {
    float values[4] = {};
    quad.visit([&](int j, int64_t row, int64_t col) {
      values[j] = load_float32(master.data + 4 * (row * master.row_stride + col));
    });
    for_each_update(scalars, num_updates, draw,
                    [&](const typename Draw::Row& row, float coefficient) {
                      add_direction(draw, row, coefficient, uid, quad, values);
                    });
    if (num_updates > 0) {
      quad.visit([&](int j, int64_t row, int64_t col) {
        store_float32(master.data + 4 * (row * master.row_stride + col), values[j]);
      });
    }
    int i = 0;
    const auto write = [&](const float z[4], int end) {
#pragma unroll 1
      for (; i < end; ++i) {
        const int slot = order.slots[i];
        const OutputRow out = slots.outputs[slot * tables.num_tensors + work.tensor];
        quad.visit([&](int j, int64_t row, int64_t col) {
          const float value = z ? fma_rn(slots.scales[slot], z[j], values[j]) : values[j];
          store(out.data, out.dtype, row * out.row_stride + col, value);
        });
      }
    };
#pragma unroll 1
    for (int d = 0; d < order.num_directions; ++d) {
      float z[4] = {};
      quad.draw(draw, draw.load_row(slots.directions + order.directions[d]), uid, z);
      write(z, order.ends[d]);
    }
    write(nullptr, order.num_slots);
  });
}

template <class Draw, int kRun>
__global__ void __launch_bounds__(kThreads, Draw::kBlocksPerSm)
    perturb_kernel(const __grid_constant__ CudaTables tables,
                   const __grid_constant__ CudaScalars scalars,
                   const __grid_constant__ SlotList slots, const __grid_constant__ SlotOrder order,
                   const __grid_constant__ Draw draw) {
  const Work work = tables.work[blockIdx.x];
  const int num_updates = scalars.max_updates > 0 ? *scalars.num_updates : 0;
  if (blockIdx.x < tables.num_vector) {
    perturb_vectors<kRun>(tables, work, scalars, slots, order, draw, num_updates);
  } else {
    perturb_quads(tables, work, scalars, slots, order, draw, num_updates);
  }
}

// The order of the slots first .. first + kMaxSlots - 1.
SlotOrder order_of(const std::vector<int64_t>& indices, size_t first) {
  SlotOrder order = {};
  const size_t size = std::min(indices.size() - first, static_cast<size_t>(kMaxSlots));
  std::map<int64_t, std::vector<size_t>> by_direction;
  for (size_t k = 0; k < size; ++k) by_direction[indices[first + k]].push_back(k);
  const auto append = [&](const std::vector<size_t>& slots) {
    for (const size_t slot : slots) order.slots[order.num_slots++] = static_cast<uint8_t>(slot);
  };
  for (const auto& [direction, slots] : by_direction) {
    if (direction < 0) continue;
    append(slots);
    order.directions[order.num_directions] = static_cast<int32_t>(direction);
    order.ends[order.num_directions++] = static_cast<uint16_t>(order.num_slots);
  }
  if (by_direction.count(-1)) append(by_direction[-1]);
  return order;
}

template <int kRun, class Draw>
const char* launch_pair(const CudaTables& tables, const CudaScalars& scalars, const SlotList& slots,
                        const Draw& draw, const CudaTarget& target) {
  const auto run = [&](auto kernel) {
    return launch(target, tables.num_work, kThreads, kernel, tables, scalars, slots, draw);
  };
  return scalars.max_updates > 0 ? run(pair_kernel<Draw, kRun, true>)
                                 : run(pair_kernel<Draw, kRun, false>);
}

// One launch for kMaxSlots slots; the first one has the update.
template <int kRun, class Draw>
const char* launch_any(const CudaTables& tables, CudaScalars scalars, SlotList slots,
                       const std::vector<int64_t>& indices, const Draw& draw,
                       const CudaTarget& target) {
  size_t first = 0;
  do {
    const SlotOrder order = order_of(indices, first);
    const char* error = launch(target, tables.num_work, kThreads, perturb_kernel<Draw, kRun>,
                               tables, scalars, slots, order, draw);
    if (error != nullptr) return error;
    first += kMaxSlots;
    scalars.max_updates = 0;
    slots.outputs += kMaxSlots * tables.num_tensors;
    slots.scales += kMaxSlots;
  } while (first < indices.size());
  return nullptr;
}

}  // namespace

const char* cuda_perturb(const CudaTables& tables, const CudaScalars& scalars,
                         const CommonSeed& seed, const std::vector<int64_t>& indices, Lanes lanes,
                         const CudaTarget& target) {
  if (tables.num_work == 0) return nullptr;
  const bool is_pair = indices.size() == 2 && indices[0] == 0 && indices[1] == 0 &&
                       scalars.max_updates <= 1 && tables.num_vector == tables.num_work;
  const SlotList slots = {tables.outputs, scalars.directions + scalars.max_updates,
                          scalars.factors + scalars.max_updates};
  return with_lanes(lanes, [&](auto size) {
    constexpr int kRun = size;
    const auto run = [&](const auto& draw) {
      return is_pair ? launch_pair<kRun>(tables, scalars, slots, draw, target)
                     : launch_any<kRun>(tables, scalars, slots, indices, draw, target);
    };
    const GaussianDraw gaussian = {round_keys(seed.key0, seed.key1)};
    if (seed.domain == kDomainGaussian) return run(gaussian);
    if (seed.domain == kDomainRademacher) return run(RademacherDraw{gaussian.keys});
    return launch_any<kRun>(tables, scalars, slots, indices, AnyDraw{}, target);
  });
}

}  // namespace mezo
