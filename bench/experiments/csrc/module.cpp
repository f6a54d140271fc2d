// The Python module bench.experiments._C: argument checks and forwarding, nothing else.
#include "bindings/address.h"
#include "step.h"

#if defined(MEZO_CUDA)
#include "bindings/launch.h"
#include "lora.h"
#endif

namespace py = pybind11;
using namespace mezo;

namespace {

// (directions, factors, num_updates, projected_grads, losses, settings, number of directions)
using StepFields = std::array<int64_t, 7>;

StepState step_state(const char* function, const StepFields& fields) {
  const int64_t n = fields[6];
  return {address<DirectionRow>(function, "directions", fields[0], 2 * n),
          address<float>(function, "factors", fields[1], n),
          address<int32_t>(function, "num_updates", fields[2], 1),
          address<double>(function, "projected_grads", fields[3], n),
          address<const double>(function, "losses", fields[4], 2 * n),
          address<const double>(function, "settings", fields[5], 3),
          n};
}

void advance(const StepFields& fields) {
  const StepState state = step_state("cpu_advance", fields);
  bool is_finite = true;
  for (int64_t k = 0; k < state.num_directions; ++k) is_finite &= advance_direction(state, k);
  *state.num_updates = is_finite ? static_cast<int32_t>(state.num_directions) : 0;
}

#if defined(MEZO_CUDA)
void advance_on_device(const StepFields& state, int device, int64_t stream) {
  raise_on("cuda_advance", cuda_advance(step_state("cuda_advance", state),
                                        target_of(device, stream)));
}

TensorRow tensor_of(const std::array<int64_t, 9>& t) {
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
}

// factors: the TensorRow of A and of B; memory: the OutputRow of x and of y, h, partials;
// tables: pairs, directions, scales; sizes: pairs, rows of x, chunks of rows in either half.
void perturbed_lora(const std::array<std::array<int64_t, 9>, 2>& factors,
                    const std::array<int64_t, 8>& memory, const std::array<int64_t, 3>& tables,
                    const std::array<int64_t, 4>& sizes, float scaling, bool is_added,
                    const SeedFields& seed, int device, int64_t stream) {
  const char* name = "cuda_perturbed_lora";
  LoraCall call = {};
  call.a = tensor_of(factors[0]);
  call.b = tensor_of(factors[1]);
  call.x = {memory[0], memory[1], memory[2]};
  call.y = {memory[3], memory[4], memory[5]};
  call.h = memory[6];
  call.partials = memory[7];
  call.num_pairs = static_cast<uint32_t>(sizes[0]);
  call.num_rows = sizes[1];
  call.shrink_chunks = static_cast<uint32_t>(sizes[2]);
  call.expand_chunks = static_cast<uint32_t>(sizes[3]);
  call.num_splits = static_cast<uint32_t>((call.a.cols + kLoraSplit - 1) / kLoraSplit);
  call.pairs = address<const LoraPair>(name, "pairs", tables[0], call.num_pairs);
  // Copies without a direction need none.
  call.directions = reinterpret_cast<const DirectionRow*>(tables[1]);
  call.scales = address<const float>(name, "scales", tables[2], call.num_pairs);
  call.scaling = scaling;
  call.is_added = is_added;
  const CudaTarget target = target_of(device, stream);
  raise_on(name, cuda_shrink(call, seed_of(seed), target));
  raise_on(name, cuda_expand(call, seed_of(seed), target));
}

void bind_cuda(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("cuda_advance", &advance_on_device, unlocked);
  module.def("cuda_perturbed_lora", &perturbed_lora, unlocked);
  module.attr("LORA_SPLIT") = kLoraSplit;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of bench.experiments; use them through its Python functions.";
  module.def("cpu_advance", &advance);
#if defined(MEZO_CUDA)
  bind_cuda(module);
#endif
}
