// Attention of rows that share prefixes, on the CPU.
#include "cpu/attention.h"

#include "bindings.h"
#include "table.h"

namespace py = pybind11;
using namespace mezo;

namespace {

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

}  // namespace

void bind_attention(py::module_& module) {
  module.def("cpu_attention", &attention, py::call_guard<py::gil_scoped_release>());
  module.attr("ATTENTION_QUERIES") = kAttentionQueries;
}
