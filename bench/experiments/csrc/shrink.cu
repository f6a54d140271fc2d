// perturbed_lora, first half: h = round(x A^T) for A of either sign, made in registers.
#include <type_traits>

#include "cuda/launcher.cuh"
#include "lora.cuh"

namespace mezo {
namespace {

constexpr int kShrinkWarps = 8;
constexpr int kShrinkThreads = 32 * kShrinkWarps;
constexpr int kWarpCols = kLoraSplit / kShrinkWarps;
// 32 columns: eight of each lane, the two groups of a 16-byte load of x.
constexpr int kChunks = kWarpCols / 32;
static_assert(kChunks * 32 == kWarpCols, "a warp has whole chunks of columns");

// Writes the sums over this block's kLoraSplit columns for kTiles times 8 ranks.
template <class Draw, int64_t kDType, int kTiles>
__global__ void __launch_bounds__(kShrinkThreads, 2)
    shrink_kernel(const __grid_constant__ LoraCall call, const __grid_constant__ Draw draw) {
  // The partial sums of every warp, as its mma leaves them; one tile's are read while the next
  // one's are written.
  constexpr int kSums = kTileMmas * kTiles;
  __shared__ float4 sums[2][kShrinkWarps][kSums][32];
  const Lane lane;
  // Divisions of 64 bits are long.
  const uint32_t slices = static_cast<uint32_t>(call.a.rows) / (8 * kTiles);
  uint32_t block = blockIdx.x;
  const int64_t split = block % call.num_splits;
  block /= call.num_splits;
  const int64_t rank0 = block % slices * 8 * kTiles;
  block /= slices;
  const uint32_t chunk = block % call.shrink_chunks;
  const LoraPair pair = call.pairs[block / call.shrink_chunks];

  const int64_t cols = call.a.cols;
  const int64_t col0 = split * kLoraSplit + lane.warp * kWarpCols + 8 * lane.t;
  uint32_t factor[2][kTiles][2 * kChunks][2];
  const PairDraw<Draw> perturbed(draw, call, pair, call.a);
  perturbed.visit([&](auto has_direction) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const Place place(call.a, rank0 + 8 * j + lane.g, col0);
      uint4 masters[2 * kChunks];
#pragma unroll
      for (int step = 0; step < 2 * kChunks; ++step) {
        const bool is_inside = col0 + 32 * (step / 2) < cols;
        masters[step] = is_inside ? place.load(8 * (step / 2) + step % 2) : make_uint4(0, 0, 0, 0);
      }
      // There are perturbations beyond the last column as well, but x is 0 there.
#pragma unroll
      for (int step = 0; step < 2 * kChunks; ++step) {
        uint32_t packed[2][2];
        perturbed.template four<kDType, has_direction>(place.group + 8 * (step / 2) + step % 2,
                                                       masters[step], packed);
#pragma unroll
        for (int copy = 0; copy < 2; ++copy) {
          factor[copy][j][step][0] = packed[copy][0];
          factor[copy][j][step][1] = packed[copy][1];
        }
      }
    }
  });

  int turn = 0;
  for_each_tile(pair, chunk, call.shrink_chunks, [&](int copy, int64_t row0, int64_t last) {
    // Rows 8 h + g of the tile; all loads are under way before the first product.
    uint4 x[2 * kTileMmas][kChunks] = {};
#pragma unroll
    for (int h = 0; h < 2 * kTileMmas; ++h) {
      const int64_t row = row0 + 8 * h + lane.g;
      const int64_t begin = call.x.data + 2 * row * call.x.row_stride;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int64_t col = col0 + 32 * c;
        if (row < last && col < cols) x[h][c] = load_16_bytes(begin + 2 * col);
      }
    }
    float sum[kTileMmas][kTiles][4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int m = 0; m < kTileMmas; ++m) {
        const uint4& low = x[2 * m][c];
        const uint4& high = x[2 * m + 1][c];
        const uint32_t operands[2][4] = {{low.x, high.x, low.y, high.y},
                                         {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          for (int i = 0; i < 2; ++i) {
            mma<kDType>(sum[m][j], operands[i], factor[copy][j][2 * c + i]);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const float* four = sum[s / kTiles][s % kTiles];
      sums[turn][lane.warp][s][threadIdx.x % 32] =
          make_float4(four[0], four[1], four[2], four[3]);
    }
    __syncthreads();
    // Warp s adds sum s of all warps, in their order.
    if (lane.warp < kSums) {
      const int s = lane.warp;
      float total[4] = {};
#pragma unroll
      for (int warp = 0; warp < kShrinkWarps; ++warp) {
        const float4 part = sums[turn][warp][s][threadIdx.x % 32];
        total[0] = add_rn(total[0], part.x);
        total[1] = add_rn(total[1], part.y);
        total[2] = add_rn(total[2], part.z);
        total[3] = add_rn(total[3], part.w);
      }
      const int64_t rank = rank0 + s % kTiles * 8 + 2 * lane.t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + s / kTiles * 16 + 8 * half + lane.g;
        if (row >= last) continue;
        const int64_t offset = (split * call.num_rows + row) * call.a.rows + rank;
        store_8_bytes(call.partials + 4 * offset, {bits_of_float(total[2 * half]),
                                                   bits_of_float(total[2 * half + 1])});
      }
    }
    turn ^= 1;
  });
}

constexpr int kFinishThreads = 128;

// h = the partial sums, added in their order and rounded; a thread has eight ranks of a row.
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ LoraCall call) {
  const int64_t size = call.num_rows * call.a.rows;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (vector * kVector >= size) return;
  float total[kVector] = {};
  for (int64_t split = 0; split < call.num_splits; ++split) {
    float part[kVector];
    load_float32_run<kVector>(call.partials + 4 * (split * size + vector * kVector), part);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total[i] = add_rn(total[i], part[i]);
  }
  store_vector(call.h + 16 * vector, call.x.dtype, total);
}

}  // namespace

const char* cuda_shrink(const LoraCall& call, const CommonSeed& seed, const CudaTarget& target) {
  const char* error = visit_draw(call, seed, [&](const auto& draw, auto dtype) {
    using Draw = std::decay_t<decltype(draw)>;
    const auto run = [&](auto kernel, int64_t ranks) {
      const int64_t blocks =
          (call.a.rows / ranks) * call.num_pairs * call.shrink_chunks * call.num_splits;
      return launch(target, blocks, kShrinkThreads, kernel, call, draw);
    };
    return call.a.rows == 8 ? run(shrink_kernel<Draw, dtype, 1>, 8)
                            : run(shrink_kernel<Draw, dtype, 2>, 16);
  });
  if (error != nullptr) return error;
  const int64_t vectors = call.num_rows * call.a.rows / kVector;
  return launch(target, (vectors + kFinishThreads - 1) / kFinishThreads, kFinishThreads,
                finish_kernel, call);
}

}  // namespace mezo
