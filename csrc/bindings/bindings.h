// Checked conversions from the integers of Python to the structs of table.h.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "step.h"

namespace mezo {

template <class T>
T* address(const char* function, const char* what, int64_t value, int64_t size) {
  if (size < 0) {
    throw pybind11::value_error(std::string(function) + ": the size of " + what +
                          " must be >= 0, got " + std::to_string(size) + "; pass its row count.");
  }
  if (value == 0 && size > 0) {
    throw pybind11::value_error(std::string(function) + ": " + what + " must be an address, got 0 for " +
                          std::to_string(size) + " rows; pass data_ptr() of the table.");
  }
  return reinterpret_cast<T*>(value);
}

inline Combination combination(const char* function, int64_t directions, int64_t coefficients,
                        int64_t size) {
  return {address<const DirectionRow>(function, "directions", directions, size),
          address<const float>(function, "coefficients", coefficients, size), size};
}

inline FanOut fan_out(const char* function, int64_t directions, int64_t num_directions, int64_t indices,
               int64_t scales, int64_t outputs, int64_t num_slots) {
  return {address<const DirectionRow>(function, "directions", directions, num_directions),
          num_directions,
          address<const int64_t>(function, "indices", indices, num_slots),
          address<const float>(function, "scales", scales, num_slots),
          address<const OutputRow>(function, "outputs", outputs, num_slots),
          num_slots};
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
