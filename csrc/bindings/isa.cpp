// The choice of a CPU code path, and what tests ask of one.
#include "cpu/isa/ops.h"

#include <stdexcept>

#include "bindings.h"

namespace py = pybind11;
using namespace mezo;

namespace {

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

}  // namespace

void bind_isa(py::module_& module) {
  module.def("set_isa", &set_isa, "Force the CPU code path: 'auto', 'portable', 'avx2', 'avx512'.");
  module.def("isa", [] { return selected_ops().name; }, "The CPU code path in use.");
  module.def("words", &words, "Philox words as uint32, for tests.");
  module.def("normals_of_words", &normals_of_words, "Gaussians of given words, for tests.");
  module.def("exps", &exps, "exp of fp32 numbers <= 0, for tests.");
  module.def("tanhs", &tanhs, "tanh of fp32 numbers, for tests.");
}
