// LoRA of a batch on the CPU.
#include "cpu/lora.h"

#include <tuple>
#include <vector>

#include "bindings.h"

namespace py = pybind11;
using namespace mezo;

namespace {

// (address, stride, width) of rows; (address, stride of a slot, stride of a row) of adapters;
// (start, stop, slot) and scaling of each segment.
using RowsFields = std::array<int64_t, 3>;
using Segments = std::vector<std::tuple<int64_t, int64_t, int64_t, float>>;

Rows rows_of(const char* function, const char* what, const RowsFields& fields) {
  return {address<float>(function, what, fields[0], 1), fields[1], fields[2]};
}

Slots slots_of(const char* function, const RowsFields& fields) {
  return {address<const float>(function, "weights", fields[0], 1), fields[1], fields[2]};
}

std::vector<LoraSegment> segments_of(const Segments& segments) {
  std::vector<LoraSegment> rows;
  for (const auto& [start, stop, slot, scaling] : segments) {
    rows.push_back({start, stop, slot, scaling});
  }
  return rows;
}

void lora_shrink(const Segments& segments, const RowsFields& x, const RowsFields& weights,
                 const RowsFields& h, int threads) {
  const char* name = "cpu_lora_shrink";
  const auto rows = segments_of(segments);
  const LoraBatch batch = {rows.data(), static_cast<int64_t>(rows.size())};
  cpu_lora_shrink(batch, rows_of(name, "x", x), slots_of(name, weights), rows_of(name, "h", h),
                  threads);
}

void lora_expand(const Segments& segments, const RowsFields& h, const RowsFields& weights,
                 const RowsFields& out, const std::vector<int64_t>& offsets, int threads) {
  const char* name = "cpu_lora_expand";
  const auto rows = segments_of(segments);
  const LoraBatch batch = {rows.data(), static_cast<int64_t>(rows.size())};
  cpu_lora_expand(batch, rows_of(name, "h", h), slots_of(name, weights), rows_of(name, "out", out),
                  offsets.data(), static_cast<int64_t>(offsets.size()) - 1, threads);
}

}  // namespace

void bind_lora(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("cpu_lora_shrink", &lora_shrink, unlocked);
  module.def("cpu_lora_expand", &lora_expand, unlocked);
}
