// perturbed_lora, second half: y = round(scaling h B^T + y), B of either sign made in registers.
#include <type_traits>

#include "cuda/launcher.cuh"
#include "lora.cuh"

namespace mezo {
namespace {

constexpr int kExpandWarps = 4;
constexpr int kExpandThreads = 32 * kExpandWarps;
// A warp has 32 outputs, four mma wide. They are permuted as well: a lane's two columns of each of
// the four, 2 t and 2 t + 1, are eight neighbours in memory.
constexpr int kWarpOutputs = 32;
constexpr int kBlockOutputs = kExpandWarps * kWarpOutputs;

// kRank 8 fills half of an mma's inner dimension. So that every lane draws what is used, lanes
// t = 0, 1 hold the ranks of one column and t = 2, 3 those of the next; h is there twice, half of it
// masked.
template <class Draw, int64_t kDType, int kRank>
__global__ void __launch_bounds__(kExpandThreads, kRank == 64 ? 3 : 4)
    expand_kernel(const __grid_constant__ LoraCall call, const __grid_constant__ Draw draw) {
  constexpr bool kIsHalf = kRank == 8;
  constexpr int kSteps = kIsHalf ? 1 : kRank / 16, kFragments = kIsHalf ? 2 : 4;
  const Lane lane;
  const int64_t outputs = call.b.rows;
  const uint32_t num_blocks = (static_cast<uint32_t>(outputs) + kBlockOutputs - 1) / kBlockOutputs;
  uint32_t block = blockIdx.x;
  const int64_t output0 = block % num_blocks * kBlockOutputs + lane.warp * kWarpOutputs;
  block /= num_blocks;
  const uint32_t chunk = block % call.expand_chunks;
  const LoraPair pair = call.pairs[block / call.expand_chunks];
  const int rank0 = 4 * (kIsHalf ? lane.t % 2 : lane.t);

  uint32_t factor[2][kFragments][kSteps][2] = {};
  const PairDraw<Draw> perturbed(draw, call, pair, call.b);
  perturbed.visit([&](auto has_direction) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int j = kIsHalf ? 2 * f + lane.t / 2 : f;
      const int64_t output = output0 + lane.g / 2 * 8 + 2 * j + lane.g % 2;
      // A branch also keeps the fragments apart: all at once would need the registers of the rows.
      if (output >= outputs) continue;
      const Place place(call.b, output, rank0);
      uint4 masters[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        masters[step] = place.load(4 * step);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t packed[2][2];
        perturbed.template four<kDType, has_direction>(place.group + 4 * step, masters[step],
                                                       packed);
#pragma unroll
        for (int copy = 0; copy < 2; ++copy) {
          factor[copy][f][step][0] = packed[copy][0];
          factor[copy][f][step][1] = packed[copy][1];
        }
      }
    }
  });

  const int64_t mine = output0 + 8 * lane.t;
  for_each_tile(pair, chunk, call.expand_chunks, [&](int copy, int64_t row0, int64_t last) {
    uint2 h[2 * kTileMmas][kSteps] = {};
#pragma unroll
    for (int i = 0; i < 2 * kTileMmas; ++i) {
      const int64_t row = row0 + 8 * i + lane.g;
      if (row >= last) continue;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        h[i][step] = load_8_bytes(call.h + 2 * (row * kRank + 16 * step + rank0));
      }
    }
#pragma unroll
    for (int m = 0; m < kTileMmas; ++m) {
      float sum[4][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint2 &low = h[2 * m][step], &high = h[2 * m + 1][step];
        const uint32_t whole[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (kIsHalf) {
            uint32_t masked[4];
            for (int i = 0; i < 4; ++i) masked[i] = lane.t / 2 == j % 2 ? whole[i] : 0;
            mma<kDType>(sum[j], masked, factor[copy][j / 2][step]);
          } else {
            mma<kDType>(sum[j], whole, factor[copy][j][step]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + 16 * m + 8 * half + lane.g;
        if (row >= last || mine >= outputs) continue;
        const int64_t address = call.y.data + 2 * (row * call.y.row_stride + mine);
        float values[kVector] = {};
        if (call.is_added) load_vector(address, kDType, values);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          values[i] = fma_rn(call.scaling, sum[i / 2][2 * half + i % 2], values[i]);
        }
        store_vector(address, kDType, values);
      }
    }
  });
}

}  // namespace

const char* cuda_expand(const LoraCall& call, const CommonSeed& seed, const CudaTarget& target) {
  return visit_draw(call, seed, [&](const auto& draw, auto dtype) {
    using Draw = std::decay_t<decltype(draw)>;
    const auto run = [&](auto kernel) {
      const int64_t num_blocks = (call.b.rows + kBlockOutputs - 1) / kBlockOutputs;
      return launch(target, num_blocks * call.num_pairs * call.expand_chunks, kExpandThreads,
                    kernel, call, draw);
    };
    switch (call.b.cols) {
      case 8:
        return run(expand_kernel<Draw, dtype, 8>);
      case 16:
        return run(expand_kernel<Draw, dtype, 16>);
      case 32:
        return run(expand_kernel<Draw, dtype, 32>);
      default:
        return run(expand_kernel<Draw, dtype, 64>);
    }
  });
}

}  // namespace mezo
