// The Python module mezo_kernels._C: argument checks and forwarding, nothing else.
//
// Addresses and streams come as integers, tables as addresses of rows (table.h); shapes, dtypes and
// lengths have been validated by mezo_kernels/plan.py. The GIL is released around the work.
#include "bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/directions.h"

namespace py = pybind11;
using namespace mezo;

#if defined(MEZO_CUDA)
void bind_cuda(py::module_& module);
#endif

namespace {

void sample(int64_t out, int64_t tensor, int64_t direction, int threads) {
  // A null output is an empty tensor's.
  if (out == 0) return;
  const auto* tensor_row = address<const TensorRow>("cpu_sample", "tensor", tensor, 1);
  const auto* direction_row = address<const DirectionRow>("cpu_sample", "direction", direction, 1);
  py::gil_scoped_release release;
  cpu_sample(reinterpret_cast<float*>(out), *tensor_row, *direction_row, threads);
}

void add_directions(int64_t tensors, int64_t num_tensors, int64_t directions, int64_t coefficients,
                    int64_t num_directions, int threads) {
  const char* name = "cpu_add_directions";
  const auto* rows = address<const TensorRow>(name, "tensors", tensors, num_tensors);
  const Combination sum = combination(name, directions, coefficients, num_directions);
  py::gil_scoped_release release;
  cpu_add_directions(rows, num_tensors, sum, threads);
}

void perturb(int64_t masters, int64_t num_tensors, int64_t update_directions,
             int64_t update_coefficients, int64_t num_updates, int64_t directions,
             int64_t num_directions, int64_t indices, int64_t scales, int64_t outputs,
             int64_t num_slots, int threads) {
  const char* name = "cpu_perturb";
  const auto* rows = address<const TensorRow>(name, "masters", masters, num_tensors);
  const Combination update =
      combination(name, update_directions, update_coefficients, num_updates);
  const FanOut slots =
      fan_out(name, directions, num_directions, indices, scales, outputs, num_slots);
  py::gil_scoped_release release;
  cpu_perturb(rows, num_tensors, update, slots, threads);
}

void advance(const StepFields& fields) { cpu_advance(step_state("cpu_advance", fields)); }

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

// (address, stride of a token or slot, stride of a head), strides in elements.
using TensorFields = std::array<int64_t, 3>;
// (rows, slots, blocks, number of blocks, H, H_kv, D, D_v, dtype).
using AttentionFields = std::array<int64_t, 9>;

AttentionTensor attention_tensor(const TensorFields& fields, int64_t dtype) {
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  return {reinterpret_cast<char*>(fields[0]), fields[1] * size, fields[2] * size};
}

void attention(const AttentionFields& fields, const std::array<TensorFields, 6>& tensors,
               int64_t lse, float scale, float soft_cap, int threads) {
  const char* name = "cpu_attention";
  const auto [rows, slots, blocks, num_blocks, heads, kv_heads, dim, v_dim, dtype] = fields;
  if (dim > kAttentionMaxDim || v_dim > kAttentionMaxDim || dtype < 0 || dtype >= kNumDTypes) {
    throw py::value_error(std::string(name) + ": head dims must be at most " +
                          std::to_string(kAttentionMaxDim) + " and dtype 0 to 2, got " +
                          std::to_string(dim) + ", " + std::to_string(v_dim) + " and " +
                          std::to_string(dtype) + "; use the Python function, which checks.");
  }
  const auto tensor = [&, type = dtype](size_t i) { return attention_tensor(tensors[i], type); };
  Attention layer = {};
  layer.q = tensor(0);
  layer.k = tensor(1);
  layer.v = tensor(2);
  layer.k_cache = tensor(3);
  layer.v_cache = tensor(4);
  layer.out = tensor(5);
  layer.lse = reinterpret_cast<float*>(lse);
  layer.rows = address<const int64_t>(name, "rows", rows, num_blocks);
  layer.slots = reinterpret_cast<const int64_t*>(slots);
  layer.heads = heads;
  layer.heads_per_kv_head = heads / kv_heads;
  layer.dim = dim;
  layer.v_dim = v_dim;
  layer.dtype = dtype;
  layer.scale = scale;
  layer.soft_cap = soft_cap;
  const auto* table = address<const AttentionBlock>(name, "blocks", blocks, num_blocks);
  cpu_attention(layer, table, num_blocks, kv_heads, threads);
}

// (address, stride) of fp32 rows.
using Strided = std::array<int64_t, 2>;

void rms_norm(const Strided& x, const Strided& residual, int64_t weight, float eps, int64_t width,
              int64_t summed, int64_t out, int64_t rows, int threads) {
  const char* name = "cpu_rms_norm";
  const RmsNorm norm = {address<const float>(name, "x", x[0], rows),
                        x[1],
                        reinterpret_cast<const float*>(residual[0]),
                        residual[1],
                        address<const float>(name, "weight", weight, width),
                        eps,
                        width,
                        reinterpret_cast<float*>(summed),
                        address<float>(name, "out", out, rows)};
  cpu_rms_norm(norm, rows, threads);
}

// cos_sin: address, stride and rows.
void rotary(const Strided& x, int64_t heads, int64_t head_dim, int64_t positions,
            const RowsFields& cos_sin, int64_t out, int64_t rows, int threads) {
  const char* name = "cpu_rotary";
  const auto* place = address<const int64_t>(name, "positions", positions, rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (place[row] < 0 || place[row] >= cos_sin[2]) {
      throw py::index_error("rotary: positions must be rows of cos_sin, 0 to " +
                            std::to_string(cos_sin[2] - 1) + ", got " +
                            std::to_string(place[row]) + "; pass a longer table.");
    }
  }
  const Rotary turn = {address<const float>(name, "x", x[0], rows),
                       x[1],
                       heads,
                       head_dim,
                       place,
                       address<const float>(name, "cos_sin", cos_sin[0], rows),
                       cos_sin[1],
                       address<float>(name, "out", out, rows)};
  cpu_rotary(turn, rows, threads);
}

void silu_and_mul(const Strided& x, int64_t width, int64_t out, int64_t rows, int threads) {
  const char* name = "cpu_silu_and_mul";
  const GatedRows gated = {address<const float>(name, "x", x[0], rows), x[1], width,
                           address<float>(name, "out", out, rows)};
  cpu_silu_and_mul(gated, rows, threads);
}

void set_isa(const std::string& name) {
  if (!select_ops(name.c_str())) {
    throw std::runtime_error("set_isa: name must be 'auto', 'portable' or an instruction set of " +
                             std::string("this CPU and build, got '") + name + "'; pass 'auto'.");
  }
}

void words(int64_t out, int64_t c0, int64_t num_groups, int64_t c1, int64_t c2, int64_t c3,
           int64_t key0, int64_t key1) {
  const DirectionRow row = {key0, key1, c2, c3};
  auto* to = address<uint32_t>("words", "out", out, num_groups);
  py::gil_scoped_release release;
  selected_ops().words(to, stream_of(row, c1), static_cast<uint32_t>(c0), num_groups);
}

void normals_of_words(int64_t out, int64_t from, int64_t num_groups) {
  auto* to = address<float>("normals_of_words", "out", out, num_groups);
  const auto* input = address<const uint32_t>("normals_of_words", "words", from, num_groups);
  py::gil_scoped_release release;
  selected_ops().from_words(to, input, num_groups);
}

void exps(int64_t out, int64_t in, int64_t n) {
  selected_ops().exps(address<float>("exps", "out", out, n),
                      address<const float>("exps", "in", in, n), n);
}

void tanhs(int64_t out, int64_t in, int64_t n) {
  selected_ops().tanhs(address<float>("tanhs", "out", out, n),
                       address<const float>("tanhs", "in", in, n), n);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = MEZO_COMPILER;
  py::list isas;
  isas.append("portable");
#if defined(MEZO_X86)
  isas.append("avx2");
  isas.append("avx512");
#endif
  info["isa_paths"] = isas;
  info["openmp"] = has_openmp();
#if defined(MEZO_CUDA)
  info["cuda_archs"] = MEZO_CUDA_ARCHS;
#else
  info["cuda_archs"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of mezo_kernels; use them through the Python functions.";
  module.def("build_info", &build_info, "How this module was built.");
  module.def("set_isa", &set_isa, "Force the CPU code path: 'auto', 'portable', 'avx2', 'avx512'.");
  module.def("isa", [] { return selected_ops().name; }, "The CPU code path in use.");
  module.def("words", &words, "Philox words as uint32, for tests.");
  module.def("normals_of_words", &normals_of_words, "Gaussians of given words, for tests.");
  module.def("exps", &exps, "exp of fp32 numbers <= 0, for tests.");
  module.def("tanhs", &tanhs, "tanh of fp32 numbers, for tests.");
  module.def("cpu_sample", &sample);
  module.def("cpu_add_directions", &add_directions);
  module.def("cpu_perturb", &perturb);
  module.def("cpu_advance", &advance);
  module.def("cpu_lora_shrink", &lora_shrink, py::call_guard<py::gil_scoped_release>());
  module.def("cpu_lora_expand", &lora_expand, py::call_guard<py::gil_scoped_release>());
  module.def("cpu_attention", &attention, py::call_guard<py::gil_scoped_release>());
  module.def("cpu_rms_norm", &rms_norm, py::call_guard<py::gil_scoped_release>());
  module.def("cpu_rotary", &rotary, py::call_guard<py::gil_scoped_release>());
  module.def("cpu_silu_and_mul", &silu_and_mul, py::call_guard<py::gil_scoped_release>());
  module.attr("ATTENTION_QUERIES") = kAttentionQueries;
  module.attr("WORK_BLOCK") = kWorkBlock;
  module.attr("VECTOR") = kVector;
#if defined(MEZO_CUDA)
  bind_cuda(module);
#endif
}
