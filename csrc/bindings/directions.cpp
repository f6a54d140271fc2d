// sample, add_directions_ and perturb_into on the CPU.
#include "cpu/directions.h"

#include "bindings.h"

namespace py = pybind11;
using namespace mezo;

namespace {

Combination combination(const char* function, int64_t directions, int64_t coefficients,
                        int64_t size) {
  return {address<const DirectionRow>(function, "directions", directions, size),
          address<const float>(function, "coefficients", coefficients, size), size};
}

FanOut fan_out(const char* function, int64_t directions, int64_t num_directions, int64_t indices,
               int64_t scales, int64_t outputs, int64_t num_slots) {
  return {address<const DirectionRow>(function, "directions", directions, num_directions),
          num_directions,
          address<const int64_t>(function, "indices", indices, num_slots),
          address<const float>(function, "scales", scales, num_slots),
          address<const OutputRow>(function, "outputs", outputs, num_slots),
          num_slots};
}

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

}  // namespace

void bind_directions(py::module_& module) {
  module.def("cpu_sample", &sample);
  module.def("cpu_add_directions", &add_directions);
  module.def("cpu_perturb", &perturb);
  // Of the work lists of GPUs, which Python makes.
  module.attr("WORK_BLOCK") = kWorkBlock;
  module.attr("VECTOR") = kVector;
}
