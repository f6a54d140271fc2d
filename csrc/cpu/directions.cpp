// Walks tensors in tiles that stay in the L1 cache, in parallel over blocks of tiles.
//
// Lines (table.h) are cut into blocks, the work items, and blocks into tiles, at multiples in e.
// Where the cuts fall changes no bit of the result.
#include "directions.h"

#include <string.h>

#include <vector>

#include "cpu/isa/ops.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mezo {
namespace {

constexpr int64_t kTile = 1024;
constexpr int64_t kBlock = 16 * kTile;
constexpr int64_t kElementSize[kNumDTypes] = {4, 2, 2};

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Upper bound over all lines, so that (line, block) is a rectangle.
int64_t blocks_per_line(const Lines& lines) { return lines.length / kBlock + 2; }

int64_t num_blocks(const Lines& lines) { return lines.count * blocks_per_line(lines); }

// n consecutive elements from position p of a tensor (row-major in the shard).
struct Tile {
  int64_t tensor, position, element, n;
};

template <class Visit>
void for_each_tile(const TensorRow* tensors, int64_t num_tensors, int threads, Visit&& visit) {
  std::vector<int64_t> ends(static_cast<size_t>(num_tensors));
  int64_t total = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    total += num_blocks(lines_of(tensors[i]));
    ends[static_cast<size_t>(i)] = total;
  }
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1)
#else
  (void)threads;
#endif
  for (int64_t item = 0; item < total; ++item) {
    int64_t low = 0, high = num_tensors - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (item < ends[static_cast<size_t>(middle)]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const Lines lines = lines_of(tensors[low]);
    const int64_t index = item - (ends[static_cast<size_t>(low)] - num_blocks(lines));
    const int64_t line = index / blocks_per_line(lines);
    const int64_t line_begin = lines.first_element + line * lines.element_stride;
    const int64_t line_end = line_begin + lines.length;
    const int64_t block = line_begin / kBlock + index % blocks_per_line(lines);
    const int64_t end = min_of((block + 1) * kBlock, line_end);
    int64_t e = block * kBlock < line_begin ? line_begin : block * kBlock;
    while (e < end) {
      const int64_t n = min_of((e / kTile + 1) * kTile, end) - e;
      visit(Tile{low, line * lines.length + e - line_begin, e, n});
      e += n;
    }
  }
}

// Calls visit(address, offset in the tile, n) for each piece of a tile that is contiguous in memory.
template <class Visit>
inline void for_each_piece(int64_t data, int64_t row_stride, int64_t dtype, int64_t cols,
                           const Tile& tile, Visit&& visit) {
  const int64_t size = kElementSize[dtype];
  if (row_stride == cols) {
    return visit(reinterpret_cast<void*>(data + tile.position * size), int64_t{0}, tile.n);
  }
  int64_t row = tile.position / cols, col = tile.position % cols;
  for (int64_t done = 0; done < tile.n; ++row, col = 0) {
    const int64_t n = min_of(cols - col, tile.n - done);
    visit(reinterpret_cast<void*>(data + (row * row_stride + col) * size), done, n);
    done += n;
  }
}

// A tile of z in the L1 cache.
class Generator {
 public:
  explicit Generator(const Ops& ops) : ops_(ops) {}

  const float* operator()(const DirectionRow& direction, int64_t uid, const Tile& tile) {
    const Stream stream = stream_of(direction, uid);
    const int64_t first = aligned_element(stream, tile.element);
    const int64_t skipped = tile.element - first;
    ops_.generate(buffer_, stream, first, skipped + tile.n);
    return buffer_ + skipped;
  }

 private:
  const Ops& ops_;
  alignas(64) float buffer_[kTile + 2 * kGeneratorSlack];
};

// From `begin` on, the end of the directions that add_gaussians takes at once.
int64_t end_of_gaussians(const Combination& sum, int64_t begin) {
  const DirectionRow& first = sum.directions[begin];
  int64_t end = begin;
  for (; end < sum.size; ++end) {
    const DirectionRow& next = sum.directions[end];
    if (next.tail >> 24 != kDomainGaussian || next.key0 != first.key0 || next.key1 != first.key1) {
      break;
    }
  }
  return end;
}

void accumulate_all(const Ops& ops, Generator& generate, const Combination& sum, int64_t uid,
                    const Tile& tile, float* acc) {
  for (int64_t k = 0; k < sum.size;) {
    const int64_t end = end_of_gaussians(sum, k);
    if (end > k) {
      const Combination part = {sum.directions + k, sum.coefficients + k, end - k};
      ops.add_gaussians(acc, part, uid, tile.element, tile.n);
      k = end;
    } else {
      const float* z = generate(sum.directions[k], uid, tile);
      ops.accumulate(acc, z, sum.coefficients[k], tile.n);
      ++k;
    }
  }
}

// The tile of a tensor in fp32: in place where that is possible, through a buffer elsewhere.
class Accumulator {
 public:
  Accumulator(const Ops& ops, const TensorRow& tensor, const Tile& tile)
      : ops_(ops), tensor_(tensor), tile_(tile), values_(buffer_) {
    const bool is_in_place = tensor.dtype == kFloat32 && tensor.row_stride == tensor.cols;
    if (is_in_place) {
      values_ = reinterpret_cast<float*>(tensor.data) + tile.position;
      return;
    }
    visit([&](void* data, int64_t offset, int64_t n) {
      ops_.load[tensor_.dtype](buffer_ + offset, data, n);
    });
  }
  float* values() { return values_; }
  void write_back() {
    if (values_ != buffer_) return;
    visit([&](void* data, int64_t offset, int64_t n) {
      ops_.store[tensor_.dtype](data, buffer_ + offset, n);
    });
  }

 private:
  template <class Visit>
  void visit(Visit&& piece) {
    for_each_piece(tensor_.data, tensor_.row_stride, tensor_.dtype, tensor_.cols, tile_, piece);
  }

  const Ops& ops_;
  const TensorRow& tensor_;
  const Tile& tile_;
  float* values_;
  alignas(64) float buffer_[kTile];
};

template <class Write>
void write_slot(const FanOut& slots, int64_t slot, int64_t num_tensors, const TensorRow& master,
                const Tile& tile, Write&& write) {
  const OutputRow& out = slots.outputs[slot * num_tensors + tile.tensor];
  for_each_piece(out.data, out.row_stride, out.dtype, master.cols, tile,
                 [&](void* data, int64_t offset, int64_t n) { write(out.dtype, data, offset, n); });
}

}  // namespace

void cpu_sample(float* out, const TensorRow& tensor, const DirectionRow& direction, int threads) {
  const Ops& ops = selected_ops();
  for_each_tile(&tensor, 1, threads, [&](const Tile& tile) {
    Generator generate(ops);
    const float* z = generate(direction, tensor.uid, tile);
    memcpy(out + tile.position, z, static_cast<size_t>(tile.n) * sizeof(float));
  });
}

void cpu_add_directions(const TensorRow* tensors, int64_t num_tensors, const Combination& sum,
                        int threads) {
  const Ops& ops = selected_ops();
  for_each_tile(tensors, num_tensors, threads, [&](const Tile& tile) {
    const TensorRow& tensor = tensors[tile.tensor];
    Generator generate(ops);
    Accumulator accumulator(ops, tensor, tile);
    accumulate_all(ops, generate, sum, tensor.uid, tile, accumulator.values());
    accumulator.write_back();
  });
}

void cpu_perturb(const TensorRow* masters, int64_t num_tensors, const Combination& update,
                 const FanOut& slots, int threads) {
  const Ops& ops = selected_ops();
  for_each_tile(masters, num_tensors, threads, [&](const Tile& tile) {
    const TensorRow& master = masters[tile.tensor];
    Generator generate(ops);
    Accumulator accumulator(ops, master, tile);
    const float* values = accumulator.values();
    if (update.size > 0) {
      accumulate_all(ops, generate, update, master.uid, tile, accumulator.values());
      accumulator.write_back();
    }
    for (int64_t d = 0; d < slots.num_directions; ++d) {
      const float* z = generate(slots.directions[d], master.uid, tile);
      for (int64_t k = 0; k < slots.num_slots; ++k) {
        if (slots.indices[k] != d) continue;
        const float scale = slots.scales[k];
        write_slot(slots, k, num_tensors, master, tile,
                   [&](int64_t dtype, void* data, int64_t offset, int64_t n) {
                     ops.fma_store[dtype](data, values + offset, z + offset, scale, n);
                   });
      }
    }
    for (int64_t k = 0; k < slots.num_slots; ++k) {
      if (slots.indices[k] >= 0) continue;
      write_slot(slots, k, num_tensors, master, tile,
                 [&](int64_t dtype, void* data, int64_t offset, int64_t n) {
                   ops.store[dtype](data, values + offset, n);
                 });
    }
  });
}

}  // namespace mezo
