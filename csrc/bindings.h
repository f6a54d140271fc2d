// Checked conversions from the integers of Python to the structs of table.h.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "table.h"

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

}  // namespace mezo
