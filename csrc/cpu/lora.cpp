// LoRA of a batch whose rows are segments, each of one adapter, in parallel over parts of segments.
#include "lora.h"

#include "cpu/isa/ops.h"
#include "parallel.h"

namespace mezo {
namespace {

constexpr int64_t kRows = 32;
constexpr int64_t kColumns = 512;

int64_t parts_of(int64_t length, int64_t part) { return (length + part - 1) / part; }

int64_t longest_of(const LoraSegment* segments, int64_t num_segments) {
  int64_t longest = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    const int64_t rows = segments[i].stop - segments[i].start;
    if (rows > longest) longest = rows;
  }
  return longest;
}

}  // namespace

void cpu_lora_shrink(const LoraBatch& batch, const Rows& x, const Slots& a, const Rows& h,
                     int threads) {
  const Ops& ops = selected_ops();
  const int64_t parts = parts_of(longest_of(batch.segments, batch.num_segments), kRows);
  for_each_item(batch.num_segments * parts, threads, [&](int64_t item) {
    const LoraSegment& segment = batch.segments[item / parts];
    const int64_t start = segment.start + item % parts * kRows;
    const int64_t end = start + kRows < segment.stop ? start + kRows : segment.stop;
    if (start >= end) return;
    ops.lora_shrink({x.data + start * x.stride, x.stride, end - start, x.width,
                     a.data + segment.slot * a.slot_stride, a.row_stride, h.width,
                     h.data + start * h.stride, h.stride, segment.scaling});
  });
}

void cpu_lora_expand(const LoraBatch& batch, const Rows& h, const Slots& b, const Rows& out,
                     const int64_t* offsets, int64_t num_slices, int threads) {
  const Ops& ops = selected_ops();
  const int64_t rank = h.width / num_slices;
  const int64_t parts = parts_of(out.width, kColumns);
  const int64_t items = num_slices * parts;
  for_each_item(batch.num_segments * items, threads, [&](int64_t item) {
    const LoraSegment& segment = batch.segments[item / items];
    const int64_t slice = item % items / parts;
    const int64_t first = offsets[slice] + item % parts * kColumns;
    const int64_t end = first + kColumns < offsets[slice + 1] ? first + kColumns
                                                              : offsets[slice + 1];
    if (first >= end) return;
    ops.lora_expand({h.data + segment.start * h.stride + slice * rank, h.stride,
                     segment.stop - segment.start, rank,
                     b.data + segment.slot * b.slot_stride + first * b.row_stride, b.row_stride,
                     end - first, out.data + segment.start * out.stride + first, out.stride});
  });
}

}  // namespace mezo
