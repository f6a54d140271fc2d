// What the bindings share. Addresses and streams come from Python as integers, tables as addresses of
// rows (table.h). The Python functions have checked shapes, dtypes and lengths. Long work runs
// without the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdint.h>

#include <array>
#include <string>

#include "step.h"

namespace mezo {

template <class T>
T* address(const char* function, const char* what, int64_t value, int64_t size) {
  if (size < 0) {
    throw pybind11::value_error(std::string(function) + ": the size of " + what +
                                " must be >= 0, got " + std::to_string(size) +
                                "; pass its row count.");
  }
  if (value == 0 && size > 0) {
    throw pybind11::value_error(std::string(function) + ": " + what +
                                " must be an address, got 0 for " + std::to_string(size) +
                                " rows; pass data_ptr() of the table.");
  }
  return reinterpret_cast<T*>(value);
}

// (directions, factors, num_updates, projected_grads, losses, settings, number of directions)
using StepFields = std::array<int64_t, 7>;

inline StepState step_state(const char* function, const StepFields& fields) {
  const int64_t n = fields[6];
  return {address<DirectionRow>(function, "directions", fields[0], 2 * n),
          address<float>(function, "factors", fields[1], n),
          address<int32_t>(function, "num_updates", fields[2], 1),
          address<double>(function, "projected_grads", fields[3], n),
          address<const double>(function, "losses", fields[4], 2 * n),
          address<const double>(function, "settings", fields[5], 3),
          n};
}

}  // namespace mezo

// One file each; every function adds its names to the module.
void bind_isa(pybind11::module_& module);
void bind_directions(pybind11::module_& module);
void bind_directions_cuda(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_layers(pybind11::module_& module);
void bind_lora(pybind11::module_& module);
