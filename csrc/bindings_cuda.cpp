// The CUDA half of mezo_kernels._C: argument checks and forwarding, nothing else.
#include <stdexcept>

#include "bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace mezo;

namespace {

CudaTarget target_of(int device, int64_t stream) {
  return {device, reinterpret_cast<void*>(stream)};
}

void raise_on(const char* function, const char* error) {
  if (error == nullptr) return;
  throw std::runtime_error(std::string(function) + ": the CUDA launch failed with '" + error +
                           "'; run with CUDA_LAUNCH_BLOCKING=1 to find the call that broke.");
}

void sample(int64_t out, int64_t tensor, int64_t direction, int device, int64_t stream) {
  // A null output is an empty tensor's.
  if (out == 0) return;
  const auto* tensor_row = address<const TensorRow>("cuda_sample", "tensor", tensor, 1);
  const auto* row = address<const DirectionRow>("cuda_sample", "direction", direction, 1);
  raise_on("cuda_sample", cuda_sample(reinterpret_cast<float*>(out), *tensor_row, row,
                                      target_of(device, stream)));
}

void add_directions(int64_t tensors, int64_t num_tensors, int64_t directions, int64_t coefficients,
                    int64_t num_directions, int device, int64_t stream) {
  const char* name = "cuda_add_directions";
  const auto* rows = address<const TensorRow>(name, "tensors", tensors, num_tensors);
  const Combination sum = combination(name, directions, coefficients, num_directions);
  raise_on(name, cuda_add_directions(rows, num_tensors, sum, target_of(device, stream)));
}

void perturb(int64_t masters, int64_t num_tensors, int64_t update_directions,
             int64_t update_coefficients, int64_t num_updates, int64_t directions,
             int64_t num_directions, int64_t indices, int64_t scales, int64_t outputs,
             int64_t num_slots, int device, int64_t stream) {
  const char* name = "cuda_perturb";
  const auto* rows = address<const TensorRow>(name, "masters", masters, num_tensors);
  const Combination update =
      combination(name, update_directions, update_coefficients, num_updates);
  const FanOut slots =
      fan_out(name, directions, num_directions, indices, scales, outputs, num_slots);
  raise_on(name, cuda_perturb(rows, num_tensors, update, slots, target_of(device, stream)));
}

}  // namespace

void bind_cuda(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("cuda_sample", &sample, unlocked);
  module.def("cuda_add_directions", &add_directions, unlocked);
  module.def("cuda_perturb", &perturb, unlocked);
}
