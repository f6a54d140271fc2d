// sample, add_directions_ and perturb_into on CUDA devices.
#include "cuda/directions.h"

#include "bindings.h"
#include "launch.h"

namespace py = pybind11;
using namespace mezo;

namespace {

// (tensors, vectors, outputs, work, number of tensors, entries of work, entries of vector tensors)
using TableFields = std::array<int64_t, 7>;
// (directions, factors, num_updates, max_updates)
using ScalarFields = std::array<int64_t, 4>;

CudaTables tables_of(const char* name, const TableFields& t) {
  if (t[6] > t[5]) {
    throw py::value_error(std::string(name) + ": the vector entries must be part of the " +
                          std::to_string(t[5]) + " entries of work, got " + std::to_string(t[6]) +
                          "; pass DeviceTables.num_vector.");
  }
  return {address<const TensorRow>(name, "tensors", t[0], t[4]),
          address<const VectorRow>(name, "vectors", t[1], t[4]),
          reinterpret_cast<const OutputRow*>(t[2]),
          address<const Work>(name, "work", t[3], t[5]),
          t[4],
          t[5],
          t[6]};
}

CudaScalars scalars_of(const char* name, const ScalarFields& s, int64_t num_slots) {
  return {reinterpret_cast<const DirectionRow*>(s[0]),
          address<const float>(name, "factors", s[1], s[3] + num_slots),
          address<const int32_t>(name, "num_updates", s[2], 1), s[3]};
}

Lanes lanes_of(bool is_contiguous) { return is_contiguous ? Lanes::kContiguous : Lanes::kWide; }

void sample(int64_t out, int64_t tensor, int64_t direction, int device, int64_t stream) {
  // A null output is an empty tensor's.
  if (out == 0) return;
  // Both rows are host memory: they are arguments of the kernel.
  const auto* tensor_row = address<const TensorRow>("cuda_sample", "tensor", tensor, 1);
  const auto* row = address<const DirectionRow>("cuda_sample", "direction", direction, 1);
  raise_on("cuda_sample", cuda_sample(reinterpret_cast<float*>(out), *tensor_row, *row,
                                      target_of(device, stream)));
}

void add_directions(const TableFields& tables, const ScalarFields& scalars, const SeedFields& seed,
                    bool is_contiguous, int device, int64_t stream) {
  const char* name = "cuda_add_directions";
  raise_on(name, cuda_add_directions(tables_of(name, tables), scalars_of(name, scalars, 0),
                                     seed_of(seed), lanes_of(is_contiguous),
                                     target_of(device, stream)));
}

void perturb(const TableFields& tables, const ScalarFields& scalars, const SeedFields& seed,
             const std::vector<int64_t>& indices, bool is_contiguous, int device,
             int64_t stream) {
  const char* name = "cuda_perturb";
  const auto num_slots = static_cast<int64_t>(indices.size());
  const CudaTables plan = tables_of(name, tables);
  address<const OutputRow>(name, "outputs", tables[2], num_slots * plan.num_tensors);
  raise_on(name, cuda_perturb(plan, scalars_of(name, scalars, num_slots), seed_of(seed), indices,
                              lanes_of(is_contiguous), target_of(device, stream)));
}

void normals_of_words(int64_t out, int64_t words, int64_t num_groups, int device, int64_t stream) {
  const char* name = "cuda_normals_of_words";
  auto* to = address<float>(name, "out", out, num_groups);
  const auto* from = address<const uint32_t>(name, "words", words, num_groups);
  raise_on(name, cuda_normals_of_words(to, from, num_groups, target_of(device, stream)));
}

}  // namespace

void bind_directions_cuda(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("cuda_sample", &sample, unlocked);
  module.def("cuda_add_directions", &add_directions, unlocked);
  module.def("cuda_perturb", &perturb, unlocked);
  module.def("cuda_normals_of_words", &normals_of_words, unlocked,
             "Gaussians of given words on the device, for tests.");
}
