// Norms, rotary embeddings and gated activations on the CPU.
#include "cpu/layers.h"

#include "bindings.h"

namespace py = pybind11;
using namespace mezo;

namespace {

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
            const std::array<int64_t, 3>& cos_sin, int64_t out, int64_t rows, int threads) {
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

}  // namespace

void bind_layers(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("cpu_rms_norm", &rms_norm, unlocked);
  module.def("cpu_rotary", &rotary, unlocked);
  module.def("cpu_silu_and_mul", &silu_and_mul, unlocked);
}
